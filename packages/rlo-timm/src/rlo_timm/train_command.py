"""`rlo-timm train` and `rlo-timm prepare`: options to settings. Imports no torch."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rlo_core.errors import RLOError

_HELP = {
    "dataset": "cifar10, cifar100, tiny-imagenet, food101, imagenet, digits, or a folder of class "
    "folders or parquet files.",
    "data_dir": "Where named data sets are, or are downloaded to.",
    "net": "vgg, res18, res34, res50, res101, vit, vit_small, vit-l, vit_timm, cait, swin, "
    "convmixer, mlpmixer, simplevit, or any timm model.",
    "loss": "Training loss, NAME or NAME:option=value,...; `rlo losses` lists them.",
    "k": "Root of a rooted loss (3 with the default loss).",
    "m": "Multiplier of a rooted loss (3 with the default loss).",
    "loss_schedule": "Move k over the run: linear, cosine, geometric or constant, e.g. "
    "cosine:warmup=0.3.",
    "size": "Image side in pixels; the data set's own if left out.",
    "epochs": "Passes over the training images.",
    "batch_size": "Images a step, on each device.",
    "opt": "Any optimiser of timm.",
    "lr": "Step size; 1e-3 for ResNets and 1e-4 otherwise if left out.",
    "weight_decay": "Weight decay.",
    "scheduler": "cosine or none.",
    "warmup_epochs": "Epochs of linear warmup.",
    "clip_grad": "Largest gradient norm.",
    "smoothing": "Label smoothing.",
    "mixup": "alpha of mixup.",
    "cutmix": "alpha of CutMix.",
    "augment": "Crop and flip the training images.",
    "randaugment": "RandAugment, N=2, M=14, besides.",
    "pretrained": "Start from timm's weights.",
    "finetune_from": "Start from the weights of a run, a .safetensors or a .ckpt file.",
    "train_limit": "Use the first N training images only.",
    "val_limit": "Use the first N validation images only.",
    "workers": "Data loading processes.",
    "download": "Let torchvision download a data set that is missing.",
    "device": "auto, cpu, gpu, mps, ...",
    "devices": "How many devices.",
    "strategy": "auto, ddp, or any strategy of Lightning.",
    "precision": "auto (mixed where the device has it), 32-true, bf16-mixed, 16-mixed, ...",
    "seed": "Makes the run deterministic.",
    "wandb": "Log to Weights & Biases too.",
}
_FLOATS = {"k", "m", "lr", "weight_decay", "clip_grad", "smoothing", "mixup", "cutmix"}
_INTEGERS = {"size", "epochs", "batch_size", "warmup_epochs", "train_limit", "val_limit"}
_INTEGERS |= {"workers", "devices", "seed"}
_FLAGS = {"augment", "randaugment", "pretrained", "download", "wandb"}
_SHORT = {"batch_size": ["-b", "--bs"], "epochs": ["--n-epochs"]}


def _options(command: Any) -> Any:
    """Add an option for each setting; none has a default here, so that YAML can be told apart."""
    for name, text in reversed(_HELP.items()):
        dashed = name.replace("_", "-")
        if name in _FLAGS:
            both = [f"--{dashed}/--no-{dashed}"]
            option = click.option(*both, name, default=None, help=text)
        else:
            spellings = list(dict.fromkeys([f"--{dashed}", f"--{name}", *_SHORT.get(name, [])]))
            kind: Any = float if name in _FLOATS else int if name in _INTEGERS else str
            option = click.option(*spellings, name, type=kind, default=None, help=text)
        command = option(command)
    return command


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder [runs/...].")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of these options.")
@click.option("--resume", type=click.Path(path_type=Path), help="Run folder to go on with.")
@click.option("--print-config", is_flag=True, help="Print the resolved options as YAML and stop.")
@click.option("--fast-dev-run", "--fast_dev_run", is_flag=True, help="One batch, no files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@_options
def train(
    out: Path | None,
    config: Path | None,
    resume: Path | None,
    print_config: bool,
    fast_dev_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train an image classifier with a loss of the family; needs no script.

    Without options: a ViT on CIFAR-10 under the rooted loss with k = m = 3, 200 epochs of Adam at
    1e-4. `--dataset digits --net res18 --epochs 2` tries it offline.
    """
    from rlo_timm.trainer.settings import Settings

    given = {key: value for key, value in options.items() if value is not None}
    base: dict[str, Any] = {}
    checkpoint: Path | None = None
    seed: int | None = None
    if resume is not None:
        from rlo_timm.trainer.fit import check_resumed, resumable

        old, checkpoint, seed = resumable(resume)
        base = old.to_dict()
        out = out or resume
    if config is not None:
        base |= _read_config(config)
    source = "options" if config is None else str(config)
    settings = Settings.from_mapping({**base, **given}, source=source)
    settings.spec()
    if resume is not None:
        check_resumed(old, settings, resume)
    if print_config:
        import yaml

        click.echo(yaml.safe_dump(settings.to_dict(), sort_keys=False), nl=False)
        return
    import logging

    from rlo_timm.trainer.fit import fit

    # Lightning's notes on devices and products; its warnings stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    folder = out or Path("runs") / f"{settings.net}-{datetime.now():%Y%m%d-%H%M%S}"
    progress = sys.stderr.isatty() and not as_json
    summary = fit(
        settings,
        folder,
        checkpoint=checkpoint,
        seed=seed,
        fast_dev_run=fast_dev_run,
        progress=progress,
    )
    if as_json:
        document = {"run": None if fast_dev_run else str(folder), "loss": str(settings.spec())}
        click.echo(json.dumps({**document, **summary}, indent=2))
    else:
        _print_table(settings, folder, summary, fast_dev_run)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RLOError(f"{str(path)!r} is no YAML file: {error}") from error
    if not isinstance(document, dict):
        raise RLOError(f"{str(path)!r} must hold options, got {type(document).__name__}")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def _print_table(settings: Any, folder: Path, summary: dict[str, Any], fast: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{settings.net} on {settings.dataset}, {settings.spec()}")
    for name in summary:
        table.add_column(name, justify="right")
    table.add_row(*[f"{v:.4f}" if isinstance(v, float) else str(v) for v in summary.values()])
    console = Console()
    console.print(table)
    if not fast:
        console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


@click.command()
@click.argument("dataset", type=click.Choice(["tiny-imagenet"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dry-run", "--dry_run", is_flag=True, help="Only count.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def prepare(dataset: str, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Move a data set's images into the class folders that readers expect."""
    import dataclasses

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
