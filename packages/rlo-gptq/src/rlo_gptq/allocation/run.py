"""Probing a model, block by block and resumable, and choosing its bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.errors import RLOError
from rlo_core.runs.folder import lock_folder

from rlo_gptq.allocation.choose import (
    allocate,
    by_kind,
    check_budget,
    curve,
    largest,
    mean_bits,
    smallest,
    uniform_points,
)
from rlo_gptq.allocation.probes import Prober, Probes
from rlo_gptq.allocation.units import EMBEDDING, HEAD, Units
from rlo_gptq.budget import Budget
from rlo_gptq.calibration.sequences import digest_of
from rlo_gptq.models.fold_checkpoint import fold_checkpoint, folded_copy, read_folded_head
from rlo_gptq.models.source import ModelSource, find_model
from rlo_gptq.pipeline.blocks import load_calibration, open_source
from rlo_gptq.pipeline.processes import Processes, join_processes
from rlo_gptq.pipeline.work_folder import PROBES_FILE, WorkFolder

if TYPE_CHECKING:
    from rlo_gptq.options import Options

Note = Callable[[int, int, str], None]


class AllocationError(RLOError):
    """Options that leave no bits to choose."""


def check_choosable(options: Options) -> None:
    """Refuse options that leave no bits to choose.

    Raises:
        AllocationError: names the option.
    """
    if options.gguf is not None:
        raise AllocationError("--bytes takes no --format gguf: its --type decides every layer's")
    if "gptq" in options.formats:
        raise AllocationError(
            "--bytes takes no --format gptq, whose readers take one number of bits for all layers; "
            "--format compressed-tensors takes several"
        )
    if options.layer.compat is not None:
        raise AllocationError("--bytes takes no --compat, whose authors had one width for all")


@contextmanager
def probed(
    options: Options,
    folder: Path,
    *,
    tokens: int,
    processes: Processes,
    note: Note,
    first: Callable[[Units], None] = lambda units: None,
) -> Iterator[tuple[Units, Probes]]:
    """Yield a model's units and what was measured of them; `folder` keeps the measurements.

    Args:
        options: Of the quantization; the bits of layers, embedding and head where they are fixed.
        folder: The checkpoint's folder, or one for probes alone.
        tokens: Over which a divergence is averaged.
        processes: This process among its peers; only the first should call this.
        note: Is told of every block.
        first: Called before anything is measured.

    Raises:
        RLOError: the model, the data or the folder is refused.
    """
    check_choosable(options)
    WorkFolder(folder, {}).check_free()
    model = find_model(options.model)
    if options.rotate is not None:
        model = fold_checkpoint(model, folded_copy(folder), seed=options.seed)
    source = open_source(options, model, processes.device)
    try:
        head = None if options.rotate is None else read_folded_head(model)
        units = Units(source, options, folded=None if head is None else head.kind)
        first(units)
        sequences, data = load_calibration(options, source, units.plan.seqlen)
        layer = asdict(options.layer)
        del layer["bits"], layer["npasses"]
        decisions = {
            "weights": source.fingerprint(),
            "tokens": digest_of(sequences),
            "data": data,
            "layer": layer,
            "seed": options.seed,
            "dtype": options.dtype,
            "rotate": options.rotate,
            "probe_tokens": tokens,
        }
        with lock_folder(folder):
            probes = Probes.open(folder / PROBES_FILE, decisions)
            Prober(units, head, probes, sequences, tokens, note).run()
        yield units, probes
    finally:
        source.close()


def choose_bits(
    options: Options,
    folder: Path,
    budget: Budget,
    *,
    tokens: int,
    device: str = "auto",
    note: Note = lambda index, count, status: None,
) -> tuple[Options, dict[str, Any]]:
    """Return the options with the bits that fit a budget at the least predicted divergence.

    Args:
        options: Of the quantization.
        folder: The checkpoint's folder; the probes are kept in it, and not made again.
        budget: How large the files may be.
        tokens: Over which a divergence is averaged.
        device: "auto", "cpu", "cuda", ...
        note: Is told of every block.

    Returns:
        The options, and what was chosen, in numbers to show.

    Raises:
        RLOError: no choice fits, or the model, the data or the folder is refused.
    """
    with join_processes(device) as processes:
        chosen: dict[str, Any] = {}
        if processes.first:
            with probed(
                options,
                folder,
                tokens=tokens,
                processes=processes,
                note=note,
                first=lambda units: _refuse(units, budget),
            ) as (units, probes):
                wanted = check_budget(units, budget)
                found = allocate(units, probes, wanted)
                fitted = units.options_of(found.bits)
                chosen = {
                    "bits": [list(rule) for rule in fitted.bits],
                    "embed_bits": fitted.embed_bits,
                    "head_bits": fitted.head_bits,
                    "shown": {
                        "budget_bytes": wanted,
                        "bytes": found.bytes,
                        "mean_bits": mean_bits(units, found.bits),
                        "predicted_kl": found.kl,
                        "uniform": uniform_points(units, probes),
                        "kinds": by_kind(units, probes, found.bits),
                        "units": found.bits,
                    },
                }
        chosen = processes.broadcast({"chosen": chosen}, 0)["chosen"]
        processes.wait()
    shown: dict[str, Any] = chosen["shown"]
    options = replace(
        options,
        bits=tuple((str(name), int(bits)) for name, bits in chosen["bits"]),
        embed_bits=chosen["embed_bits"],
        head_bits=chosen["head_bits"],
    )
    return options, shown


def _refuse(units: Units, budget: Budget) -> None:
    check_budget(units, budget)


def discard_folded(folder: Path) -> None:
    """Remove the folded copy that probes of `--rotate fold` were made on."""
    shutil.rmtree(folded_copy(folder), ignore_errors=True)


def pareto_curve(
    options: Options,
    folder: Path,
    *,
    points: int,
    tokens: int,
    device: str = "auto",
    note: Note = lambda index, count, status: None,
) -> dict[str, Any]:
    """Return the best bits over all sizes, beside models whose layers all have the same.

    Args:
        options: Of a quantization.
        folder: Keeps the probes.
        points: Sizes, evenly spaced.
        tokens: Over which a divergence is averaged.
        device: "auto", "cpu", "cuda", ...
        note: Is told of every block.

    Raises:
        RLOError: the model, the data or the folder is refused.
    """
    with join_processes(device) as processes:
        try:
            with probed(options, folder, tokens=tokens, processes=processes, note=note) as found:
                units, probes = found
                rows = [
                    {
                        "bytes": allocation.bytes,
                        "mean_bits": mean_bits(units, allocation.bits),
                        **{
                            f"{name}_bits": allocation.bits[name]
                            for name in (EMBEDDING, HEAD)
                            if name in allocation.bits
                        },
                        "predicted_kl": allocation.kl,
                        "units": allocation.bits,
                    }
                    for allocation in curve(units, probes, points=points)
                ]
                uniform = uniform_points(units, probes)
        finally:
            if options.rotate is not None:
                discard_folded(folder)
    return {"model": options.model, "curve": rows, "uniform": uniform}


def size_range(
    source: ModelSource, options: Options, budget: Budget, *, folded: str | None
) -> dict[str, int]:
    """Return the sizes that can be chosen, for a plan; measures nothing.

    Raises:
        RLOError: no choice fits, or there is nothing to choose.
    """
    check_choosable(options)
    units = Units(source, options, folded=folded)
    return {
        "budget_bytes": check_budget(units, budget),
        "smallest_bytes": units.file_bytes(smallest(units)),
        "largest_bytes": units.file_bytes(largest(units)),
    }
