"""One quantization with a run's files beside the checkpoint: run.json, metrics, a report."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlo_core.errors import RunError
from rlo_core.runs.folder import lock_folder
from rlo_core.runs.record import RUN_FILE, Run, read_run

from rlo_gptq.budget import PROBE_TOKENS, Budget
from rlo_gptq.pipeline.progress import Bar, Log

if TYPE_CHECKING:
    from rlo_gptq.models.source import ModelSource
    from rlo_gptq.options import Options
    from rlo_gptq.pipeline.blocks import Result
    from rlo_gptq.pipeline.plan import Plan
    from rlo_gptq.pipeline.progress import Progress
    from rlo_gptq.pipeline.work_folder import WorkFolder


def run_quantization(
    options: Options,
    folder: Path,
    *,
    device: str = "auto",
    progress: bool | None = None,
    base: str | None = None,
    budget: Budget | None = None,
    probe_tokens: int = PROBE_TOKENS,
) -> dict[str, Any] | None:
    """Quantize, with a run's files and a report beside the checkpoint.

    Args:
        options: What to do.
        folder: The checkpoint's folder.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress on stderr; by default if it is a terminal.
        base: The original model's name for the model card, if not that in `options`.
        budget: Choose the bits of the layers, of embedding and head within this size; those that
            `options` fixes stay.
        probe_tokens: Over which each layer's effect on the output is then measured.

    Returns:
        The summary; None in all processes but the first.

    Raises:
        RLOError: the model, the data or the folder is refused, or another process writes there.
    """
    allocation: dict[str, Any] | None = None
    if budget is not None:
        options, allocation = _within(
            options, folder, budget, tokens=probe_tokens, device=device, progress=progress
        )
    document = _run(
        options, folder, device=device, progress=progress, base=base, allocation=allocation
    )
    if document is None or allocation is None:
        return document
    return {**document, "allocation": allocation}


def _within(
    options: Options,
    folder: Path,
    budget: Budget,
    *,
    tokens: int,
    device: str,
    progress: bool | None,
) -> tuple[Options, dict[str, Any]]:
    from rlo_gptq.allocation.run import choose_bits

    shown = sys.stderr.isatty() if progress is None else progress
    with Bar([]) if shown else Log([]) as bar:
        return choose_bits(options, folder, budget, tokens=tokens, device=device, note=bar.block)


def _run(
    options: Options,
    folder: Path,
    *,
    device: str,
    progress: bool | None,
    base: str | None,
    allocation: dict[str, Any] | None,
) -> dict[str, Any] | None:
    if options.end_to_end is not None:
        from rlo_gptq.tuning.after_rounding import quantize_and_tune

        return quantize_and_tune(options, folder, device=device, progress=progress, base=base)
    from rlo_gptq.formats.gguf.finish import write_gguf
    from rlo_gptq.pipeline.blocks import quantize_model
    from rlo_gptq.pipeline.finish import write_checkpoint
    from rlo_gptq.pipeline.processes import join_processes
    from rlo_gptq.report.page import write_page

    begin = time.perf_counter()
    runs: list[Run] = []
    documents: list[dict[str, Any]] = []
    source_bytes: list[int] = []
    named = base or options.model
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(device))
        if processes.first:
            stack.enter_context(lock_folder(folder))
        shown = sys.stderr.isatty() if progress is None else progress
        bar = stack.enter_context(Bar(runs) if processes.first and shown else Log(runs))

        def start(plan: Plan, work: WorkFolder, data: dict[str, Any]) -> None:
            if work.done:
                return
            layer = options.layer.to_dict()
            runs.append(
                Run.create(
                    folder,
                    kind="gptq quantize",
                    options={
                        "model": named,
                        "dataset": options.dataset,
                        **work.decisions,
                        "layer": layer,
                    },
                    seed=options.seed,
                    data=data,
                )
            )

        def finish(work: WorkFolder, source: ModelSource, plan: Plan) -> None:
            source_bytes.append(_source_bytes(options.model, source))
            if options.gguf is not None:
                write_gguf(work, source, plan.layout, options, base=named)
                return
            write_checkpoint(work, source, plan, options.layer, base=named, dataset=options.dataset)

        def report(result: Result, plan: Plan) -> None:
            seconds = round(time.perf_counter() - begin, 3)
            document = {
                **_measured(result, plan, options, folder),
                **({} if allocation is None else _chosen(allocation)),
                "source_bytes": source_bytes[0],
                "seconds": seconds,
            }
            documents.append(document)
            columns = ("layer", "rows", "columns", "tokens", "proxy", "seconds")
            by_error = sorted(result.records, key=lambda record: -float(record["proxy"]))
            table = [{key: record[key] for key in columns} for record in by_error]
            runs[0].finish(**document, layers_by_error=table, tuned_blocks=result.tuned)
            write_page(folder, title=f"Quantized: {folder.name}")

        quantize_model(
            options,
            folder,
            processes,
            progress=cast("Progress", bar),
            on_start=start,
            finish=finish,
            report=report,
        )
        if not processes.first:
            return None
        return documents[0] if documents else {**read_summary(folder), "already_done": True}


def _source_bytes(model: str, source: ModelSource) -> int:
    """Return the bytes of the original's weight files: of a GGUF file, its own."""
    from rlo_gptq.checkpoint.load import weight_bytes
    from rlo_gptq.formats.gguf.finish import gguf_origin

    origin = gguf_origin(model)
    return weight_bytes(source.folder) if origin is None else origin.stat().st_size


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what a run that is complete has reported.

    Raises:
        RunError: run.json is not there, or holds no summary.
    """
    summary = read_run(folder).get("summary")
    if not isinstance(summary, dict):
        raise RunError(
            f"{str(folder / RUN_FILE)!r} has no summary of the finished run; the model beside it "
            "is complete"
        )
    return summary


def _measured(result: Result, plan: Plan, options: Options, folder: Path) -> dict[str, Any]:
    """Return the run's summary."""
    from rlo_gptq.checkpoint.load import weight_files

    worst = max(result.records, key=lambda record: float(record["proxy"]))
    weights = [record["rows"] * record["columns"] for record in result.records]
    return {
        "folder": str(folder),
        "layers": len(result.records),
        **({} if options.gguf is None else {"gguf": options.gguf}),
        "bits": options.layer.bits,
        **({"bits_of_weights": plan.summary["bits"]} if options.bits else {}),
        "bits_per_weight": _bits_per_weight(result.records, plan, options),
        "mean_proxy": sum(r["proxy"] for r in result.records) / len(result.records),
        "worst_proxy": worst["proxy"],
        "worst_layer": worst["layer"],
        "bytes": sum(file.stat().st_size for file in weight_files(folder)),
        "embedding": plan.outside.reasons[0],
        "head": plan.outside.reasons[1],
        "quantized_parameters": sum(weights),
        **_tuned(result.tuned),
        "resumed_blocks": result.resumed,
    }


def _chosen(allocation: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's summary keeps of a choice of bits: numbers, and a table."""
    names = ("budget_bytes", "mean_bits", "predicted_kl")
    return {**{name: allocation[name] for name in names}, "bits_chosen": allocation["kinds"]}


def _bits_per_weight(records: list[dict[str, Any]], plan: Plan, options: Options) -> float:
    """Return the mean bits of a quantized weight, scales included."""
    if options.gguf is None:
        return float(plan.summary["bits_per_weight"])
    sizes = [int(record["rows"]) * int(record["columns"]) for record in records]
    bits = [float(record["bits"]) for record in records]
    return round(sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes), 3)


def _tuned(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean error of the finetuned blocks, before and after; empty without any."""
    names = {"block_error_before": "error_before", "block_error_after": "error_after"}
    if not records:
        return {}
    return {name: sum(r[key] for r in records) / len(records) for name, key in names.items()}
