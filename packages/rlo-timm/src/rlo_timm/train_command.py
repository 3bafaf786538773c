"""`rlo-timm train`, `eval`, `push` and `prepare`: options to settings. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from rlo_core.errors import RLOError

from rlo_timm.trainer.settings import TrainSettings

_SPELLINGS = {
    "batch_size": ["-b", "--bs"],
    "epochs": ["--n-epochs", "--n_epochs"],
    "scheduler": ["--sched"],
    "pretrained": ["--pretrained/--no-pretrained"],
    "clip_grad": ["--clip-grad"],
    "num_classes": ["--nb-classes"],
    "model_ema": ["--ema/--no-ema"],
    "net": ["--model"],
}
"""Spellings besides the field's own name: the authors' and timm's."""


def _options(command: Any) -> Any:
    """Add an option for each setting; none has a default here, so that YAML can be told apart."""
    hints = get_type_hints(TrainSettings)
    for field in reversed(dataclasses.fields(TrainSettings)):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        dashed, text = field.name.replace("_", "-"), field.metadata["help"]
        more = _SPELLINGS.get(field.name, [])
        if bool in kinds:
            names = dict.fromkeys([f"--{dashed}/--no-{dashed}", *more])
            option = click.option(*names, field.name, default=None, help=text)
        else:
            names = dict.fromkeys([f"--{dashed}", f"--{field.name}", *more])
            kind = float if float in kinds else int if int in kinds else str
            option = click.option(*names, field.name, type=kind, default=None, help=text)
        command = option(command)
    return command


def _authors_flags(command: Any) -> Any:
    """Add the switches of the authors' script that are other options of ours."""
    for flag, text in (
        ("--noaug", "The same as --no-augment."),
        ("--noamp", "The same as --precision 32-true."),
        ("--nowandb", "The same as --no-wandb."),
    ):
        command = click.option(flag, flag[2:], is_flag=True, help=text)(command)
    return command


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder [runs/...].")
@click.option("--overwrite", is_flag=True, help="Replace a run that is in --out.")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of these options.")
@click.option("--resume", type=click.Path(path_type=Path), help="Run folder to go on with.")
@click.option("--print-config", is_flag=True, help="Print what training would use, and stop.")
@click.option("--fast-dev-run", "--fast_dev_run", is_flag=True, help="One batch, no files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@_options
@_authors_flags
def train(
    out: Path | None,
    overwrite: bool,
    config: Path | None,
    resume: Path | None,
    print_config: bool,
    fast_dev_run: bool,
    as_json: bool,
    noaug: bool,
    noamp: bool,
    nowandb: bool,
    **options: Any,
) -> None:
    """Train an image classifier with a loss of the family; needs no script.

    Without options: a ViT on CIFAR-10 under the rooted loss with k = m = 3, 200 epochs of Adam at
    1e-4. `--dataset digits --net res18 --epochs 2` tries it offline.
    """
    switched = {"augment": noaug, "wandb": nowandb}
    given: dict[str, Any] = {name: False for name, on in switched.items() if on}
    if noamp:
        given["precision"] = "32-true"
    given |= {key: value for key, value in options.items() if value is not None}
    base: dict[str, Any] = {}
    if resume is not None:
        from rlo_timm.trainer.resuming import check_resumed, keep_loss, resumable

        old = resumable(resume)
        base = old.settings.to_dict()
    if config is not None:
        given = _read_config(config) | given
    source = "options" if config is None else str(config)
    if resume is not None:
        base |= {"k": None, "m": None, "loss_schedule": None}
    settings = TrainSettings.from_mapping({**base, **given}, source=source)
    if resume is not None:
        settings = keep_loss(old.settings, settings, given)
    if print_config:
        import yaml

        from rlo_timm.trainer.plan import make_plan

        if resume is not None:
            check_resumed(old, settings)
        resolved = make_plan(settings).settings.to_dict()
        click.echo(yaml.safe_dump(resolved, sort_keys=False), nl=False)
        return
    from rlo_timm.trainer.fit import train as run

    _show_notes()
    if settings.loss == "auto":
        settings = _chosen(settings, out)
    result = run(
        settings,
        out=out,
        resume=resume,
        overwrite=overwrite,
        fast_dev_run=fast_dev_run,
        progress=sys.stderr.isatty() and not as_json,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2, default=str))
        return
    _print_table(f"{settings.net} on {settings.dataset}, {result.loss}", dataclasses.asdict(result))
    if result.run is not None:
        click.echo(f"report: {result.run / 'report.html'}")


def _chosen(settings: TrainSettings, out: Path | None) -> TrainSettings:
    """Compare losses on the same data first, and return the settings with the one chosen."""
    from rlo_core.compare.run import choose

    from rlo_timm.compare import TimmTask

    folder = Path("runs") if out is None else out.parent
    stem = out.name if out is not None else f"{settings.net}-{settings.dataset}".replace("/", "-")
    rates = None if settings.lr is None else tuple(settings.lr * f for f in (0.3, 1.0, 3.0))
    verdict = choose(
        TimmTask(settings, rates=rates),
        out=folder / f"{stem}-compare",
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(f"{verdict['summary']} ({folder / f'{stem}-compare'})", err=True)
    return dataclasses.replace(settings, loss=verdict["choice"], lr=verdict["rate"])


def _show_notes() -> None:
    """Show the package's own notes on stderr, as plain lines."""
    logger = logging.getLogger("rlo_timm")
    if not logger.handlers:
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + record.getMessage(), err=True)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RLOError(f"{str(path)!r} is no YAML file: {error}") from error
    if not isinstance(document, dict):
        raise RLOError(f"{str(path)!r} must hold options, got {type(document).__name__}")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def _print_table(title: str, row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = {name: value for name, value in row.items() if name not in ("run",)}
    if "loss" in shown and isinstance(shown["loss"], str):
        del shown["loss"]
    table = Table(title=title)
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*[f"{v:.4f}" if isinstance(v, float) else str(v) for v in shown.values()])
    Console().print(table)


@click.command("eval")
@click.argument("model")
@click.argument("data")
@click.option("--data-dir", "--data_dir", default="data", show_default=True)
@click.option("--split", default="validation", show_default=True, help="Of a data set of timm's.")
@click.option("--val-limit", "--val_limit", type=int, help="Use N images, all classes alike.")
@click.option("-b", "--batch-size", "--batch_size", default=256, show_default=True)
@click.option("--workers", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--loss", default="ce", show_default=True, help="Objective to measure besides.")
@click.option("--download/--no-download", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def evaluate(
    model: str,
    data: str,
    data_dir: str,
    split: str,
    val_limit: int | None,
    batch_size: int,
    workers: int,
    device: str,
    loss: str,
    download: bool,
    as_json: bool,
) -> None:
    """Measure MODEL (a run folder, a timm model, hf-hub:OWNER/NAME) on the validation part of DATA.

    Top-1, top-5, cross entropy, calibration error, and the objective.
    """
    from rlo_timm.trainer.evaluate import evaluate as run

    result = run(
        model,
        data,
        data_dir=data_dir,
        split=split,
        limit=val_limit,
        batch_size=batch_size,
        workers=workers,
        device=device,
        loss=loss,
        download=download,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        _print_table(f"{model} on {data}", dataclasses.asdict(result))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True, help="Of a repository that is made.")
def push(run: Path, repository: str, private: bool) -> None:
    """Upload the model of RUN to the hub as REPOSITORY (OWNER/NAME), where timm finds it."""
    from rlo_timm.trainer.publish import push as upload

    click.echo(upload(run, repository, private=private))


@click.command()
@click.argument("dataset", type=click.Choice(["tiny-imagenet"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dry-run", "--dry_run", is_flag=True, help="Only count.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def prepare(dataset: str, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Move a data set's images into the class folders that readers expect."""
    from rlo_timm.trainer.tiny_imagenet import prepare as prepare_tiny

    done = prepare_tiny(folder, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done), default=str, indent=2))
        return
    verb = "to move" if dry_run else "moved"
    click.echo(
        f"{done.root}: {done.moved} images {verb}; {done.classes} classes, {done.train} training "
        f"and {done.val} validation images"
    )
