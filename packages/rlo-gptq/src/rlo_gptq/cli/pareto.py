"""`rlo-gptq pareto`: what every size would cost, before anything is quantized."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rlo_gptq.budget import PROBE_TOKENS
from rlo_gptq.cli import options as shared
from rlo_gptq.cli.groups import GroupedCommand, filled
from rlo_gptq.cli.quantize_groups import (
    Calibration,
    Formats,
    Grid,
    Rotation,
    Rounding,
    Running,
    Tuning,
)
from rlo_gptq.cli.quantize_options import chosen_options
from rlo_gptq.cli.sizes import config
from rlo_gptq.cli.tune import EndToEnd


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.argument("dataset")
@filled("grid", Grid)
@filled("rotation", Rotation)
@filled("rounding", Rounding)
@filled("calibration", Calibration)
@filled("running", Running)
@click.option(
    "--save",
    "folder",
    type=shared.new_folder,
    required=True,
    help="Keeps what is measured; `quantize --bytes` with the same --save goes on from it.",
)
@shared.both_spellings(
    "probe-tokens",
    type=click.IntRange(min=2),
    default=PROBE_TOKENS,
    show_default=True,
    help="Over which each layer's effect on the output is measured.",
)
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=25,
    show_default=True,
    help="Sizes, from the smallest to the largest.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the curve: .svg, .png or .html.",
)
@config
@shared.as_json
def pareto(
    model: str,
    dataset: str,
    folder: Path,
    probe_tokens: int,
    points: int,
    plot: Path | None,
    as_json: bool,
    *,
    grid: Grid,
    rotation: Rotation,
    rounding: Rounding,
    calibration: Calibration,
    running: Running,
) -> None:
    """Predict the divergence to the dense MODEL at every size, from probes calibrated on DATASET.

    Layers are rounded at all widths and tried one at a time; nothing is quantized.
    """
    if plot is not None and plot.suffix.lower() not in (".svg", ".png", ".html"):
        raise click.UsageError(f"--plot must end in .svg, .png or .html, got {plot.name!r}")
    options = chosen_options(
        model,
        dataset,
        grid=grid,
        rotation=rotation,
        rounding=rounding,
        calibration=calibration,
        tuning=Tuning(),
        end_to_end=EndToEnd(),
        formats=Formats(),
        running=running,
    )
    from rlo_gptq.allocation.run import pareto_curve
    from rlo_gptq.pipeline.progress import Bar, Log

    with Bar([]) if sys.stderr.isatty() else Log([]) as bar:
        document = pareto_curve(
            options,
            folder,
            points=points,
            tokens=probe_tokens,
            device=running.device,
            note=bar.block,
        )
    if plot is not None:
        from rlo_gptq.allocation.picture import write_curve

        write_curve(document, plot)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    _show(document)


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="bits chosen for each layer, and the same bits for all")
    for name in ("MB", "mean bits", "embedding", "predicted KL"):
        table.add_column(name, justify="right")
    rows = [(row, f"{row['mean_bits']:.2f}") for row in document["curve"]]
    rows += [(row, f"all {row['bits']}") for row in document["uniform"]]
    for row, bits in sorted(rows, key=lambda pair: int(pair[0]["bytes"])):
        embedding = row.get("embedding_bits")
        table.add_row(
            f"{row['bytes'] / shared.MB:.3f}",
            bits,
            "" if embedding is None else str(embedding),
            f"{row['predicted_kl']:.4g}",
        )
    Console().print(table)
