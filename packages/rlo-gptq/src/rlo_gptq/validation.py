"""Checks on a checkpoint that someone else may have written: every refusal names the tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rlo_core.errors import RLOError
from safetensors import safe_open

from rlo_gptq.quant_linear import KEPT_DTYPE, QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = {
    torch.int32: ("I32",),
    torch.int64: ("I64",),
    torch.float16: ("F16",),
    torch.bfloat16: ("BF16",),
    torch.float32: ("F32",),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(RLOError, ValueError):
    """A checkpoint that is damaged, or that was made to do damage."""


def require(condition: bool, message: str) -> None:
    """Refuse with `message` unless `condition` holds.

    Raises:
        CheckpointError: it does not.
    """
    if not condition:
        raise CheckpointError(message)


def _headers(files: Sequence[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of every tensor in the files; reads headers only."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        require(file.suffix == ".safetensors", f"{file.name!r} must be a safetensors file")
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - it is no mapping
                    part = handle.get_slice(name)
                    found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
        except OSError as error:
            raise CheckpointError(f"{file.name!r} cannot be read: {error}") from error
        except Exception as error:  # safetensors has one exception type, outside any family
            raise CheckpointError(
                f"{file.name!r} is not a whole safetensors file: {error}"
            ) from error
    return found


def check_files(files: Sequence[Path], model: PreTrainedModel, quantized: Sequence[str]) -> None:
    """Refuse files in which a tensor of the model is missing, or has another shape or type.

    Args:
        files: The safetensors files of the checkpoint.
        model: With its empty `QuantLinear`s in place.
        quantized: Their names.

    Raises:
        CheckpointError: names the first such tensor.
    """
    found = _headers(files)
    prefix = f"{model.base_model_prefix}."
    packed = {f"{name}.{child}" for name in quantized for child in ("weight", *KEPT_DTYPE, "seed")}
    tied = set(model.all_tied_weights_keys)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head_name = next((f"{name}.weight" for name, m in model.named_modules() if m is head), None)
    for full, tensor in model.state_dict().items():
        # A task head of one's own (sequence classification) may be new; the rest must be there.
        inside = full.startswith(prefix) or not hasattr(model, prefix[:-1]) or full == head_name
        if full in tied or not inside:
            continue
        names = (full, prefix + full, full.removeprefix(prefix))
        stored = next((name for name in names if name in found), None)
        require(stored is not None, f"the checkpoint lacks tensor {full!r}")
        assert stored is not None
        shape, kind = found[stored]
        require(
            shape == tuple(tensor.shape),
            f"tensor {stored!r} must have shape {tuple(tensor.shape)}, got {shape}",
        )
        types = _NAMES[tensor.dtype] if full in packed else _FLOATS
        if tensor.is_floating_point() or full in packed:
            require(
                kind in types, f"tensor {stored!r} must have type {' or '.join(types)}, got {kind}"
            )


def check_values(name: str, module: QuantLinear) -> None:
    """Refuse a loaded layer with a grid that is not finite, or an input scale that is not positive.

    Every bit pattern is a code, so codes cannot be out of range.

    Raises:
        CheckpointError: names the tensor.
    """
    for child in ("scales", "zeros", "input_scale"):
        tensor = getattr(module, child)
        if tensor is None or tensor.is_meta:
            continue
        require(
            bool(torch.isfinite(tensor).all()),
            f"tensor '{name}.{child}' must be finite, got NaN or inf",
        )
        if child == "input_scale":
            require(bool((tensor > 0).all()), f"tensor '{name}.{child}' must be positive")


def check_folder(folder: Path) -> None:
    """Refuse a folder whose index names files outside of it, or files that are not there.

    Raises:
        CheckpointError: names the file.
    """
    require((folder / "config.json").is_file(), f"{str(folder)!r} has no config.json")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        require(
            (folder / "model.safetensors").is_file(), f"{str(folder)!r} has no model.safetensors"
        )
        return
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name!r} is not an index: {error!r}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
        require(plain, f"{index.name!r} names {name!r}, which is not a file of this folder")
        require((folder / name).is_file(), f"{str(folder)!r} lacks {name}")
