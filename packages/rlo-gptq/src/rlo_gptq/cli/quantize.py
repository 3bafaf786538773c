"""`rlo-gptq quantize`: the authors' flags, and those they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlo_gptq.budget import PROBE_TOKENS
from rlo_gptq.cli import options as shared
from rlo_gptq.cli.formats import check_peers, described, export_and_verify
from rlo_gptq.cli.groups import GroupedCommand, filled
from rlo_gptq.cli.options import MB, both_spellings, print_plan
from rlo_gptq.cli.quantize_groups import (
    Calibration,
    Formats,
    Grid,
    Rotation,
    Rounding,
    Running,
    Size,
    Tuning,
)
from rlo_gptq.cli.quantize_options import RECOMMENDED, chosen_options, recommended
from rlo_gptq.cli.sizes import config
from rlo_gptq.cli.tune import EndToEnd
from rlo_gptq.cli.tune import described as tuning_described
from rlo_gptq.pipeline.run import run_quantization as run_quantization

if TYPE_CHECKING:
    from rlo_gptq.budget import Budget
    from rlo_gptq.options import Options


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.argument("dataset")
@filled("grid", Grid)
@filled("size", Size)
@filled("rotation", Rotation)
@filled("rounding", Rounding)
@filled("calibration", Calibration)
@filled("tuning", Tuning)
@filled("end_to_end", EndToEnd)
@filled("formats", Formats)
@filled("running", Running)
@shared.save
@config
@both_spellings("dry-run", is_flag=True, help="Print plan, memory and time; do nothing.")
@shared.as_json
def quantize(
    model: str,
    dataset: str,
    folder: Path,
    dry_run: bool,
    as_json: bool,
    *,
    grid: Grid,
    size: Size,
    rotation: Rotation,
    rounding: Rounding,
    calibration: Calibration,
    tuning: Tuning,
    end_to_end: EndToEnd,
    formats: Formats,
    running: Running,
) -> None:
    """Quantize MODEL (hub name, folder, GGUF), calibrated on DATASET (wikitext2, c4, ptb, path)."""
    plain, rotation = rotation, recommended(grid, rounding, rotation, formats)
    said = RECOMMENDED if rotation != plain else None  # with the result: a refusal is one line
    options = chosen_options(
        model,
        dataset,
        grid=grid,
        rotation=rotation,
        rounding=rounding,
        calibration=calibration,
        tuning=tuning,
        end_to_end=end_to_end,
        formats=formats,
        running=running,
    )
    if dry_run:
        _print_plan(options, running.device, budget=size.budget, as_json=as_json)
        _say(said)
        return
    check_peers(formats.peers, options.formats)
    document = run_quantization(
        options,
        folder,
        device=running.device,
        budget=size.budget,
        probe_tokens=size.probe_tokens or PROBE_TOKENS,
    )
    if document is None:  # not the first process
        return
    _say(said)
    document["exports"] = [
        export_and_verify(folder, None, name, formats.peers, again=True) for name in options.formats
    ]
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    _show(document)


def _say(line: str | None) -> None:
    if line is not None:
        click.echo(line, err=True)


def _show(document: dict[str, Any]) -> None:
    """Print what was done, for people."""
    done = "complete already: " if document.get("already_done") else ""
    click.echo(
        f"{done}{document['layers']} layers at {document['bits_per_weight']} bits per weight, mean "
        f"proxy loss {document['mean_proxy']:.4g}, worst {document['worst_proxy']:.4g} "
        f"({document['worst_layer']}), {document['bytes'] / MB:.1f} MB, "
        f"{document['seconds']:.1f} s: {document['folder']}"
    )
    if "allocation" in document:
        _show_allocation(document["allocation"])
    if "block_error_before" in document:
        click.echo(
            f"blocks tuned: mean error on held-out sequences {document['block_error_before']:.4g} "
            f"-> {document['block_error_after']:.4g}"
        )
    if "end_to_end" in document:
        click.echo(tuning_described(document["end_to_end"]))
    for exported in document["exports"]:
        click.echo(described(exported))


def _show_allocation(found: dict[str, Any]) -> None:
    """Print the bits that were chosen, a row for each kind of layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['mean_bits']:.3f} bits a layer's weight on average, "
        f"{found['bytes'] / MB:.2f} MB of {found['budget_bytes'] / MB:.2f} MB, predicted KL "
        f"divergence {found['predicted_kl']:.4g}"
    )
    for name in ("layers", "mean bits", "how many have which", "MB", "predicted KL"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for row in found["kinds"]:
        table.add_row(
            row["kind"],
            f"{row['bits']:.2f}",
            row["widths"],
            f"{row['bytes'] / MB:.3f}",
            f"{row['kl']:.4g}",
        )
    Console().print(table)


# What a plan says of a checkpoint, and not of a GGUF file.
_OF_A_CHECKPOINT = (
    "bits_per_weight",
    "bits",
    "checkpoint_bytes",
    "layer_bytes",
    "embedding_bytes",
    "head_bytes",
    "other_bytes",
)


def _print_plan(options: Options, device: str, *, budget: Budget | None, as_json: bool) -> None:

    from rlo_gptq.models.fold import check_foldable
    from rlo_gptq.models.outside import find_outside
    from rlo_gptq.models.source import find_model
    from rlo_gptq.pipeline.blocks import open_source
    from rlo_gptq.pipeline.plan import discover
    from rlo_gptq.pipeline.processes import pick_device

    source = open_source(options, find_model(options.model), pick_device(device))
    folded = None
    if options.rotate is not None:
        family = check_foldable(source.config.to_dict())
        folded = family.rotation if find_outside(source.model)[2] else None
    plan = discover(source, options, folded=folded)
    sizes: dict[str, Any] = {}
    if budget is not None:
        from rlo_gptq.allocation.run import size_range

        sizes = size_range(source, options, budget, folded=folded)
    if options.gguf is not None:
        from rlo_gptq.formats.gguf.finish import check_writable, planned_file

        check_writable(source, plan.layout, plan.shapes, options)
        sizes = planned_file(
            source, plan.layout, options, base=options.model, folded=folded is not None
        )
        for name in _OF_A_CHECKPOINT:
            del plan.summary[name]
    tuned: dict[str, int] = {}
    if options.end_to_end is not None:
        from rlo_gptq.tuning.memory import packed_config, plan_tuning

        config = packed_config(plan, options.layer)
        tuned = plan_tuning(source, config, options.end_to_end, offload=options.offload)
    source.close()
    document = {
        **plan.summary,
        **sizes,
        "seqlen": plan.seqlen,
        "nsamples": options.nsamples,
        "settings": options.layer.to_dict(),
        **{f"tuning_{name}": value for name, value in tuned.items()},
    }
    print_plan(document, as_json=as_json)
