"""`rlo-gptq merge`: a finetuned adapter into a packed model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.options import MB
from rlo_gptq.pipeline.run import run_quantization


@click.command("merge")
@click.argument("adapter", type=shared.existing_folder)
@click.argument("dataset")
@shared.save
@click.option("--nsamples", type=click.IntRange(min=1), help="Calibration sequences.")
@click.option("--seqlen", type=click.IntRange(min=2), help="Tokens of a calibration sequence.")
@shared.split
@click.option(
    "--tune/--no-tune",
    default=True,
    show_default=True,
    help="As in quantize, end to end if the model was tuned so; without it most of what was learnt "
    "is rounded away at 2 bits.",
)
@shared.offload
@shared.device
@shared.as_json
def merge(
    adapter: Path,
    dataset: str,
    folder: Path,
    nsamples: int | None,
    seqlen: int | None,
    split: str | None,
    tune: bool,
    offload: bool,
    device: str,
    as_json: bool,
) -> None:
    """Merge ADAPTER, trained on one of our models, and pack the sum again, calibrated on DATASET.

    Settings are those the model was quantized with. No grid holds What + BA exactly, so that the
    merged model is less exact than model and adapter side by side.
    """
    document = merge_adapter(
        adapter,
        dataset,
        folder,
        changes={"nsamples": nsamples, "seqlen": seqlen, "split": split},
        tune=tune,
        offload=offload,
        device=device,
    )
    if document is None:  # not the first process
        return
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(
        f"{document['layers']} layers packed again, mean proxy loss {document['mean_proxy']:.4g} "
        f"to the merged weights, {document['bytes'] / MB:.1f} MB: {folder}"
    )


def merge_adapter(
    adapter: Path,
    dataset: str,
    folder: Path,
    *,
    changes: dict[str, Any],
    tune: bool | None = None,
    offload: bool = False,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Merge an adapter and pack the sum again.

    Args:
        adapter: The adapter's folder.
        dataset: For calibration.
        folder: Of the new checkpoint.
        changes: Calibration options other than those the model was quantized with; None keeps one.
        tune: Finetune blocks, and end to end a model that was tuned so; None does as was done.
        offload: Keep activations in a file.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The summary, as that of `run_quantization`.

    Raises:
        RLOError: the adapter, its base, the data or the folder is refused.
    """
    from dataclasses import replace

    from rlo_gptq.adapters.merge import packed_base, quantize_options, write_merged
    from rlo_gptq.pipeline.processes import join_processes
    from rlo_gptq.pipeline.work_folder import discard_unless_begun, refuse_writer

    options = quantize_options(packed_base(adapter), dataset, changes=changes, tune=tune)
    with join_processes(device) as processes:
        dense = folder.with_name(f".{folder.name}.merged")
        if processes.first:
            refuse_writer(folder)
            write_merged(adapter, dense)
        processes.wait()
        options = replace(options, model=str(dense), offload=offload)
        try:
            from rlo_gptq.tuning.after_rounding import quantize_and_tune

            run = run_quantization if options.end_to_end is None else quantize_and_tune
            document = run(options, folder, device=device, base=str(adapter))
            processes.wait()
        finally:
            if processes.first:
                discard_unless_begun(dense, folder)
    return document
