"""Checks on a checkpoint that someone else may have written: every refusal names the tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError
from safetensors import safe_open
from torch import Tensor, nn

from rlo_gptq.packed.packed_weight import KEPT_DTYPE, PackedWeight

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
_PACKED = ("weight", *KEPT_DTYPE, "seed", "order")
_every_tensor_used: ContextVar[bool] = ContextVar("every_tensor_used", default=False)
_PART = 1 << 22
_LONGEST = 600
LARGEST_WEIGHT = 1e30
"""Products and sums of weights up to here stay far from float32's largest number."""


class CheckpointError(RLOError, ValueError):
    """A checkpoint that is damaged, or that was made to do damage: one line, whatever it holds."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split())[:_LONGEST])


def require(condition: bool, message: str) -> None:
    """Refuse with `message` unless `condition` holds.

    Raises:
        CheckpointError: it does not.
    """
    if not condition:
        raise CheckpointError(message)


Headers = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of every tensor of a checkpoint."""


def read_headers(files: Sequence[Path]) -> Headers:
    """Return shape and type of every tensor in the files; reads headers only.

    Raises:
        CheckpointError: names the file that is damaged, or the tensor that two of them have.
    """
    found: Headers = {}
    for file in files:
        require(file.suffix == ".safetensors", f"{file.name!r} must be a safetensors file")
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - it is no mapping
                    require(name not in found, f"tensor {name!r} must be in one file, got two")
                    part = handle.get_slice(name)
                    found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
        except OSError as error:
            raise CheckpointError(f"{file.name!r} cannot be read: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # safetensors has one exception type, outside any family
            raise CheckpointError(
                f"{file.name!r} is not a whole safetensors file: {error}"
            ) from error
    return found


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: it is missing, no JSON, nested without end, or no object.
    """
    place = f"{file.name} of {str(file.parent)!r}"
    try:
        document = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(file.parent)!r} has no {file.name}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{place} is not JSON: {str(error)[:200]}") from error
    require(isinstance(document, dict), f"{place} must hold an object")
    return dict(document)


_LARGER = 64
"""How many times larger than any stored tensor's side a size in config.json may be: sizes are sides
of tensors, or divide them, or are small multiples (fused projections)."""


def check_sizes(config: Mapping[str, Any], headers: Headers) -> None:
    """Refuse a config.json of a model far larger than its files, before such a model is built.

    A skeleton without weights still makes its modules and its tables of angles: ten million blocks
    would take hours, and a width of 10^9 gigabytes.

    Raises:
        CheckpointError: names the entry.
    """
    largest = max((side for shape, _ in headers.values() for side in shape), default=1)
    for name, value in _numbers(config, ""):
        last = name.rpartition(".")[2]
        limit = None
        if last.startswith(("num", "n_")) and ("layer" in last or "block" in last):
            limit = len(headers)
        elif any(word in last for word in ("size", "dim", "head", "expert", "rank", "width")):
            limit = _LARGER * largest
        if limit is not None:
            require(
                value <= limit,
                f"{name} of config.json must be at most {limit} for tensors like these, "
                f"got {value:.6g}",
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested objects, under their names joined by dots."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "quantization_config":
                yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def check_files(files: Sequence[Path], model: PreTrainedModel, quantized: Sequence[str]) -> None:
    """Refuse files in which a tensor of the model is missing, or has another shape or type.

    Inside of `every_tensor_used`, refuse those with further tensors too.

    Args:
        files: The safetensors files of the checkpoint.
        model: With its empty `QuantLinear`s in place.
        quantized: Their names.

    Raises:
        CheckpointError: names the first such tensor.
    """
    found = read_headers(files)
    prefix = f"{model.base_model_prefix}."
    packed = {f"{name}.{child}" for name in quantized for child in _PACKED}
    tied = set(model.all_tied_weights_keys)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_head = next((f"{name}." for name, m in model.named_modules() if m is head), None)
    left = set(found) - tied
    for full, tensor in model.state_dict().items():
        # A task head of one's own (sequence classification) may be new; the rest must be there.
        inside = full.startswith(prefix) or not hasattr(model, prefix[:-1])
        inside = inside or (of_head is not None and full.startswith(of_head))
        if full in tied or not inside:
            continue
        names = (full, prefix + full, full.removeprefix(prefix))
        stored = next((name for name in names if name in found), None)
        require(stored is not None, f"the checkpoint lacks tensor {full!r}")
        assert stored is not None
        left.discard(stored)
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
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unused = [name for name in left if not any(re.search(rule, name) for rule in ignored)]
    require(
        not (unused and _every_tensor_used.get()),
        f"config.json describes a model that has no use for {len(unused)} of the checkpoint's "
        f"tensors, {min(unused, default='')!r} among them",
    )


@contextmanager
def every_tensor_used() -> Iterator[None]:
    """Refuse, when a model is loaded inside the block, tensors of its files that it does not have.

    `from_pretrained` of another class than the checkpoint's may leave the output layer.
    """
    token = _every_tensor_used.set(True)
    try:
        yield
    finally:
        _every_tensor_used.reset(token)


def check_values(name: str, module: PackedWeight) -> None:
    """Refuse a loaded layer with a grid that is not finite, or an input scale that is not positive.

    Every bit pattern is a code, so codes cannot be out of range.

    Raises:
        CheckpointError: names the tensor.
    """
    for child in KEPT_DTYPE:
        tensor = getattr(module, child)
        if tensor is None or tensor.is_meta:
            continue
        require_finite(f"{name}.{child}", tensor)
        if child == "input_scale":
            require(bool((tensor > 0).all()), f"tensor '{name}.{child}' must be positive")
    if module.scales.is_meta:
        return
    if module.order is not None:
        every = torch.arange(module.columns, device=module.order.device)
        require(
            torch.equal(module.order.long().sort().values, every),
            f"tensor '{name}.order' must hold each of 0..{module.columns - 1} once",
        )
    # A finite scale of 1e38 still gives infinite weights: the largest factor is named.
    factors = {"scales": float(module.scales.abs().max()) * 2**module.bits}
    if module.zeros is not None:
        factors["zeros"] = 1 + float(module.zeros.abs().max())
    if module.input_scale is not None:
        factors["input_scale"] = max(1.0, float(module.input_scale.max()))
    most, largest = math.prod(factors.values()), max(factors, key=lambda child: factors[child])
    require(
        most < LARGEST_WEIGHT, f"tensor '{name}.{largest}' must give finite weights, got {most:.3g}"
    )


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinity, a part at a time.

    Raises:
        CheckpointError: names it.
    """
    flat = tensor.reshape(-1)
    parts = (flat[at : at + _PART] for at in range(0, flat.numel(), _PART))
    good = all(bool(torch.isfinite(part).all()) for part in parts)
    require(good, f"tensor {name!r} must be finite, got NaN or inf")


def check_parameters(model: nn.Module) -> None:
    """Refuse loaded weights that are not packed and not finite.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            require_finite(name, parameter.detach())


def check_folder(folder: Path) -> None:
    """Refuse a folder whose index names files outside of it, or files that are not there.

    Raises:
        CheckpointError: names the file.
    """
    require((folder / "config.json").is_file(), f"{str(folder)!r} has no config.json")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name!r} is not an index: it has no weight_map")
    for name in weight_map.values():
        plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
        require(plain, f"{index.name!r} names {name!r}, which is not a file of this folder")
        good = name.isprintable() and len(name) < 256 and (folder / name).is_file()
        require(good, f"{str(folder)!r} lacks {name[:256]!r}")


def weight_paths(folder: Path) -> list[Path]:
    """Return the weight files of a folder that `check_folder` let pass: its index's, or the one.

    Raises:
        CheckpointError: there is none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_object(index)["weight_map"].values()))]
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    single = folder / "model.safetensors"
    require(bool(found), f"{str(folder)!r} has no {single.name}")
    return [single] if single in found else found
