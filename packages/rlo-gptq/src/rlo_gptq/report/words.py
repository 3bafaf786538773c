"""What a run made, as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(
    document: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Return what was made as (name, sentence) pairs; what is not known is left out.

    Args:
        document: The run's.
        settings: Of the layers, where the run does not say them: that of a tuning.
    """
    options: Mapping[str, Any] = document.get("options") or {}
    summary: Mapping[str, Any] = document.get("summary") or {}
    layer: Mapping[str, Any] = options.get("layer") or settings or {}
    data = "Text" if "tune" in str(document.get("kind")) else "Calibration"
    found = [
        ("Model", _model(options, summary)),
        ("Rounding", _rounding(layer, options)),
        (data, _calibration(options, document)),
        ("Embedding and head", _outside(summary)),
        ("Size", _size(summary)),
        ("Error", _error(summary)),
        ("Tuning", _tuning(summary)),
        ("Time", _time(document, summary)),
    ]
    return [(name, text) for name, text in found if text]


def _model(options: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    name = _short(options.get("model"))
    if not name:
        return ""
    layers, weights = summary.get("layers"), summary.get("quantized_parameters")
    text = f"{name}"
    if layers:
        text += f": {layers:,} linear layers quantized"
    if weights:
        text += f", {weights / 1e6:,.1f} million weights"
    kind = summary.get("gguf")
    return f"{text}, as a GGUF file of type {kind}" if kind else text


def _rounding(layer: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    if not layer:
        return ""
    groups = {-1: "a scale for each row", 0: "one scale for each matrix"}
    size = layer.get("group_size", -1)
    parts = [
        f"{layer.get('bits')} bits by {layer.get('method')}",
        groups.get(size, f"a scale for every {size} columns"),
    ]
    if layer.get("grid") == "trellis":
        parts.append("trellis-coded")
    if layer.get("incoherence", "none") != "none":
        parts.append(f"{layer['incoherence']} incoherence")
    if options.get("rotate"):
        parts.append("rotations folded into the weights")
    return ", ".join(parts)


def _calibration(options: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    data: Mapping[str, Any] = document.get("data") or {}
    name = _short(options.get("dataset") or data.get("name"))
    if not name:
        return ""
    split = f" ({data['split']})" if data.get("split") else ""
    count, length = options.get("nsamples"), options.get("seqlen")
    size = f", {count:,} sequences of {length:,} tokens" if count and length else ""
    weighted = options.get("hessian")
    by = f", tokens weighted by {weighted}" if weighted not in (None, "plain") else ""
    return f"{name}{split}{size}{by}"


def _outside(summary: Mapping[str, Any]) -> str:
    parts = [f"{name}: {summary[name]}" for name in ("embedding", "head") if summary.get(name)]
    return "; ".join(parts)


def _size(summary: Mapping[str, Any]) -> str:
    size, before = summary.get("bytes"), summary.get("source_bytes")
    if not size:
        return ""
    text = f"{size / 1e6:,.1f} MB of weight files"
    if before:
        text += f", {before / 1e6:,.1f} MB before ({before / size:.2f} times as large)"
    bits = summary.get("bits_per_weight")
    return f"{text}; {bits:.3g} bits a quantized weight, scales included" if bits else text


def _error(summary: Mapping[str, Any]) -> str:
    mean, worst = summary.get("mean_proxy"), summary.get("worst_proxy")
    if mean is None or worst is None:
        return ""
    after = " (of rounding, before tuning)" if _tuned(summary) else ""
    return f"proxy loss {mean:.4g} in the mean, {worst:.4g} at {summary.get('worst_layer')}{after}"


def _tuned(summary: Mapping[str, Any]) -> bool:
    return "held_out_kl_after" in summary or "block_error_after" in summary


def _tuning(summary: Mapping[str, Any]) -> str:
    parts = []
    if "block_error_after" in summary:
        parts.append(
            f"blocks: error on held-out sequences {summary['block_error_before']:.4g} -> "
            f"{summary['block_error_after']:.4g}"
        )
    if "held_out_kl_after" in summary:
        parts.append(
            "whole model: KL divergence to the original on held-out text "
            f"{summary['held_out_kl_before']:.4f} -> {summary['held_out_kl_after']:.4f} at step "
            f"{summary.get('best_step')} of {summary.get('steps')}"
        )
    return "; ".join(parts)


def _time(document: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    seconds = summary.get("seconds") or document.get("seconds")
    machine: Mapping[str, Any] = document.get("machine") or {}
    parts = []
    if seconds:
        parts.append(f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} minutes")
    parts += [str(machine[name]) for name in ("gpu", "cpu") if machine.get(name)][:1]
    if document.get("started"):
        parts.append(str(document["started"])[:10])
    return ", ".join(parts)


def _short(name: object) -> str:
    """Return a hub name whole, and the last part of a path."""
    text = str(name or "").rstrip("/")
    return (
        text
        if text.count("/") == 1 and not text.startswith((".", "/", "~"))
        else (text.rpartition("/")[2])
    )
