"""Tables and pictures of several models: bits, bytes, perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.lm.models import ADAPTER_FILE, adapter_base
from rlo_core.runs.record import read_run

from rlo_gptq.checkpoint.hf_quantizer import METHOD
from rlo_gptq.checkpoint.load import read_quantization, weight_bytes
from rlo_gptq.evaluation.open_model import EvaluationError, check_model
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.settings import LayerSettings


def original_of(folder: Path) -> str:
    """Return the name of the model that a checkpoint was made of, from its run.json.

    Raises:
        EvaluationError: it is not known.
    """
    try:
        return str(read_run(folder)["options"]["model"])
    except (RLOError, KeyError) as error:
        raise EvaluationError(
            f"the original of {str(folder)!r} is not known; name it with --original MODEL"
        ) from error


def compare_models(
    names: Sequence[str],
    dataset: str | None,
    *,
    context: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
) -> list[dict[str, Any]]:
    """Return a row for each model: bits, bytes, perplexity on `dataset`, seconds to make it."""
    rows = []
    folders = [check_model(name) for name in names]
    for folder, name in zip(folders, names, strict=True):
        row: dict[str, Any] = {"model": name, **_described(folder)}
        try:
            row["quantize_seconds"] = read_run(folder)["summary"]["seconds"]
        except (RLOError, KeyError):
            row["quantize_seconds"] = None
        if dataset is not None:
            result = evaluate_perplexity(
                name, dataset, context=context, max_tokens=max_tokens, device=device, dtype=dtype
            )
            row |= {
                key: result[key] for key in ("perplexity", "tokens", "context", "calibrated_on_it")
            }
        rows.append(row)
    return rows


def _described(folder: Path) -> dict[str, Any]:
    """Return bits, method, incoherence and bytes of a model, or of an adapter with its base."""
    if (folder / ADAPTER_FILE).is_file():
        base = _described(check_model(adapter_base(folder)))
        size = base["bytes"] + weight_bytes(folder)
        return {**base, "method": f"{base['method']} + adapter", "bytes": size}
    found = read_quantization(folder)
    method = found.get("quant_method")
    row: dict[str, Any] = {"bits": found.get("bits"), "method": method or "original"}
    if method == METHOD:
        settings = LayerSettings.from_dict(found["settings"])
        row = {
            "bits": _bits(settings.bits, found.get("bits", {})),
            "method": settings.method,
            "incoherence": settings.incoherence,
            "grid": settings.grid,
            "groups": settings.group_size,
            **made_by(folder),
        }
    return {**row, "bytes": weight_bytes(folder)}


DIFFERENCES = ("grid", "groups", "rotate", "tune", "weighted by", "calibration")
"""What `compare` shows where its rows differ in it."""


def made_by(folder: Path) -> dict[str, Any]:
    """Return how a checkpoint was made, as far as its run says."""
    try:
        run = read_run(folder)
    except RLOError:
        return {}
    options, summary = run.get("options"), run.get("summary")
    options = options if isinstance(options, dict) else {}
    summary = summary if isinstance(summary, dict) else {}
    tuned = [
        stage
        for stage, key in (("block", "block_error_after"), ("e2e", "held_out_kl_after"))
        if key in summary
    ]
    hessian = options.get("hessian", "plain")
    return {
        "rotate": options.get("rotate") or "",
        "tune": " + ".join(tuned),
        "weighted by": "" if hessian == "plain" else str(hessian),
        "calibration": str(options.get("dataset", "")).rstrip("/").rpartition("/")[2],
    }


def _bits(usual: int, others: Mapping[str, int]) -> int | str:
    """Return the layers' bits, or what they range over."""
    every = sorted({usual, *others.values()})
    return usual if len(every) == 1 else f"{every[0]} to {every[-1]}"


def plot_comparison(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw perplexity against size on disk, one labelled point for each model.

    Raises:
        EvaluationError: no perplexities were measured.
    """
    from rlo_core.runs.charts import colours, new_figure, save_picture

    points = [row for row in rows if row.get("perplexity") is not None]
    if not points:
        raise EvaluationError("a plot needs perplexities: give --dataset")
    figure, (axes,) = new_figure(6.4, 4.2)
    colour = colours([str(row["model"]) for row in points])
    for row in points:
        label = Path(str(row["model"])).name
        x, y = row["bytes"] / 1e6, row["perplexity"]
        axes.scatter([x], [y], color=colour[str(row["model"])])
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    return save_picture(figure, path)
