"""Settings, sizes and errors of the layers of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_gptq.checkpoint.hf_quantizer import METHOD
from rlo_gptq.checkpoint.load import read_quantization, weight_files
from rlo_gptq.evaluation.open_model import EvaluationError
from rlo_gptq.models.source import find_model
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    pass


def inspect_model(name: str) -> dict[str, Any]:
    """Return settings, sizes and the layers' errors of a quantized model; reads headers only.

    Raises:
        EvaluationError: the model is not one of ours.
    """
    from safetensors import safe_open

    folder = find_model(name)
    quantization = read_quantization(folder)
    if quantization.get("quant_method") != METHOD:
        raise EvaluationError(f"{name!r} is not quantized by {METHOD}")
    settings = LayerSettings.from_dict(quantization["settings"])
    measured = _measured(folder)
    layers, packed, other = [], 0, 0
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for tensor in stored.keys():  # noqa: SIM118 - it is no mapping
                part = stored.get_slice(tensor)
                size = _bytes(part.get_shape(), str(part.get_dtype()))
                shapes[tensor] = (tuple(part.get_shape()), size)
    quantized = {tensor.removesuffix(".scales") for tensor in shapes if tensor.endswith(".scales")}
    for layer in sorted(quantized, key=_natural):
        sizes = {t: s for t, (_, s) in shapes.items() if t.rpartition(".")[0] == layer}
        packed += sum(sizes.values())
        rows, groups = shapes[f"{layer}.scales"][0]
        layers.append(
            {
                "layer": layer,
                "rows": rows,
                "groups": groups,
                "bytes": sum(sizes.values()),
                **measured.get(layer, {}),
            }
        )
    other = sum(size for _, size in shapes.values()) - packed
    return {
        "model": name,
        "settings": settings.to_dict(),
        "packed_bytes": packed,
        "other_bytes": other,
        "layers": layers,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _bytes(shape: Sequence[int], kind: str) -> int:
    size = int("".join(c for c in kind if c.isdigit()) or 8) // 8
    for extent in shape:
        size *= extent
    return size


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Return proxy loss and seconds of each layer, from metrics.jsonl if it is there."""
    from rlo_core.runs.record import read_metrics

    return {
        record["layer"]: {key: record[key] for key in ("columns", "proxy", "seconds")}
        for record in read_metrics(folder)
        if {"layer", "columns", "proxy", "seconds"} <= set(record)
    }
