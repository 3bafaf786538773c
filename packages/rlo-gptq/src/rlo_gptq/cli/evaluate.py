"""`rlo-gptq eval`, `inspect` and `compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rlo_core.cli.groups import format_table

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.options import MB, both_spellings
from rlo_gptq.jobs import evaluate as measure

_dtype = shared.dtype("Of weights that are not packed, and of activations.")
_context = click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens of a window; by default the model's length, at most 2048.",
)
_max_tokens = both_spellings(
    "max-tokens",
    type=click.IntRange(min=2),
    help="Use only the beginning of the text.",
)


@click.command("eval")
@click.argument("model")
@click.argument("dataset", required=False)
@click.option("--tasks", help="Tasks of lm-eval, e.g. arc_easy,piqa.")
@both_spellings(
    "include-path",
    type=shared.existing_folder,
    help="A folder with YAML files of your own tasks, as lm-eval's option of that name.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task.")
@click.option(
    "--original",
    is_flag=False,
    flag_value="",
    help="Measure the original model too; named, or the one in run.json.",
)
@shared.split
@_context
@_max_tokens
@shared.device
@_dtype
@shared.verify
@shared.as_json
def evaluate(
    model: str,
    dataset: str | None,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    original: str | None,
    split: str | None,
    context: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure MODEL's perplexity on DATASET, and tasks of lm-eval."""
    if dataset is None and tasks is None:
        raise click.UsageError("give a DATASET, or --tasks")
    from rlo_gptq.evaluation.compare import original_of
    from rlo_gptq.evaluation.open_model import check_model
    from rlo_gptq.evaluation.tasks import check_lm_eval, evaluate_tasks

    document: dict[str, Any] = {"model": model}
    if tasks is not None:
        check_lm_eval()
    if dataset is not None:
        names = [("", model)]
        if original is not None:
            names.append(("original_", original or original_of(Path(model))))
        for _, name in names:  # the last one before hours go into the first
            check_model(name)
        for prefix, name in names:
            result = asdict(
                measure(
                    name,
                    dataset,
                    context=context,
                    max_tokens=max_tokens,
                    device=device,
                    dtype=dtype,
                    split=split,
                    progress=_show if sys.stderr.isatty() else None,
                )
            )
            document |= {f"{prefix}{key}": value for key, value in result.items()}
    if tasks is not None:
        document["tasks"] = evaluate_tasks(
            model,
            tasks.split(","),
            limit=limit,
            device=device,
            dtype=dtype,
            include_path=include_path,
        )
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    if dataset is not None:
        click.echo(
            f"perplexity {document['perplexity']:.4f} ({document['ce']:.4f} nats per token, "
            f"{document['tokens']} tokens, windows of {document['context']})"
        )
        if "original_perplexity" in document:
            click.echo(f"original   {document['original_perplexity']:.4f}")
        _warn_of_calibration(model, document)
    for task, metrics in document.get("tasks", {}).items():
        click.echo(f"{task}: " + ", ".join(f"{k}={v}" for k, v in metrics.items()))


def _warn_of_calibration(model: str, result: Mapping[str, Any]) -> None:
    if result.get("calibrated_on_it"):
        click.echo(
            f"warning: {model} was calibrated or tuned on this very text; its perplexity on other "
            "text is higher",
            err=True,
        )


def _show(done: int, count: int) -> None:
    click.echo(f"\rwindow {done}/{count}", err=True, nl=done == count)


@click.command()
@click.argument("model")
@shared.as_json
def inspect(model: str, as_json: bool) -> None:
    """Show the layers of a quantized MODEL: shape, bytes, error."""
    from rlo_gptq.evaluation.inspect_layers import inspect_model

    document = inspect_model(model)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    rows = [("layer", "rows", "columns", "bits", "groups", "bytes", "proxy loss", "seconds")]
    for layer in document["layers"]:
        proxy = layer.get("proxy")
        rows.append(
            (
                layer["layer"],
                str(layer["rows"]),
                str(layer.get("columns", "")),
                str(layer["bits"]),
                str(layer["groups"]),
                str(layer["bytes"]),
                "" if proxy is None else f"{proxy:.5f}",
                str(layer.get("seconds", "")),
            )
        )
    click.echo(format_table(rows))
    shown = {k: v for k, v in document["settings"].items() if v is not None}
    if document["tuned"]:
        click.echo(f"proxy losses are those of rounding, before tuning ({document['tuned']})")
    click.echo("settings: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    click.echo(
        f"packed {document['packed_bytes'] / MB:.2f} MB, "
        f"other {document['other_bytes'] / MB:.2f} MB, files {document['file_bytes'] / MB:.2f} MB"
    )


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--dataset", help="Measure perplexity on it: wikitext2, c4, ptb, a path.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Perplexity against size, as .png or .svg; needs --dataset.",
)
@_context
@_max_tokens
@shared.device
@_dtype
@shared.verify
@shared.as_json
def compare(
    models: tuple[str, ...],
    dataset: str | None,
    plot: Path | None,
    context: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Compare MODELS: bits, size on disk, perplexity, seconds to make."""
    if plot is not None and dataset is None:
        raise click.UsageError("--plot needs --dataset")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise click.UsageError(f"--plot must end in .png or .svg, got {plot.name!r}")
    from rlo_gptq.evaluation.compare import DIFFERENCES, compare_models, plot_comparison

    rows = compare_models(
        models, dataset, context=context, max_tokens=max_tokens, device=device, dtype=dtype
    )
    if plot is not None:
        plot_comparison(rows, plot)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    differing = [name for name in DIFFERENCES if len({str(row.get(name, "")) for row in rows}) > 1]
    columns = ("model", "bits", "method", "incoherence", *differing)
    columns += ("MB", "perplexity", "seconds")
    table: list[tuple[str, ...]] = [columns]
    for row in rows:
        ppl, seconds = row.get("perplexity"), row["quantize_seconds"]
        table.append(
            (
                Path(row["model"]).name,
                str(row["bits"] or ""),
                row["method"],
                row.get("incoherence", ""),
                *(str(row.get(name, "")) for name in differing),
                f"{row['bytes'] / MB:.2f}",
                "" if ppl is None else f"{ppl:.4f}",
                "" if seconds is None else f"{seconds:.1f}",
            )
        )
    click.echo(format_table(table))
    for row in rows:
        _warn_of_calibration(row["model"], row)
