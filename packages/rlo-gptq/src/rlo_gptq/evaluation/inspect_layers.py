"""Settings, sizes and errors of the layers of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlo_gptq.bit_rules import described
from rlo_gptq.checkpoint.hf_quantizer import METHOD, RLOGPTQConfig
from rlo_gptq.checkpoint.load import read_quantization, weight_bytes, weight_files
from rlo_gptq.checkpoint.outside import outside_modules
from rlo_gptq.evaluation.compare import made_by
from rlo_gptq.evaluation.open_model import EvaluationError
from rlo_gptq.models.source import find_model
from rlo_gptq.settings import LayerSettings


def inspect_model(name: str) -> dict[str, Any]:
    """Return settings, sizes and the layers' errors of a quantized model; reads headers only.

    The errors are those of rounding; `tuned` names the stages of tuning that came after it.

    `file_bytes` are those of the weight files; their headers are all that is in them beside
    `packed_bytes` and `other_bytes`.

    Raises:
        EvaluationError: the model is not one of ours.
    """
    from safetensors import safe_open

    folder = find_model(name)
    quantization = read_quantization(folder)
    if quantization.get("quant_method") != METHOD:
        raise EvaluationError(f"{name!r} is not quantized by {METHOD}")
    config = RLOGPTQConfig.from_dict(dict(quantization))
    settings: LayerSettings = config.layer_settings
    outside = outside_modules(config.outside)
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
    by_layer: dict[str, int] = {}
    for tensor, (_, size) in shapes.items():
        owner = tensor.rpartition(".")[0]
        by_layer[owner] = by_layer.get(owner, 0) + size
    for layer in sorted(quantized, key=_natural):
        packed += by_layer[layer]
        of_layer = outside[layer].settings if layer in outside else None
        inside = layer.removeprefix(f"{config.blocks}.")
        bits = config.bits.get(inside, settings.bits) if of_layer is None else of_layer.bits
        rows, groups = shapes[f"{layer}.scales"][0]
        layers.append(
            {
                "layer": layer,
                "rows": rows,
                "groups": groups,
                "bits": bits,
                "bytes": by_layer[layer],
                **measured.get(layer, {}),
            }
        )
    other = sum(size for _, size in shapes.values()) - packed
    return {
        "model": name,
        "settings": settings.to_dict(),
        "tuned": made_by(folder).get("tune", ""),
        "bits": described([layer["bits"] for layer in layers if layer["layer"] not in outside]),
        "file_bytes": weight_bytes(folder),
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
