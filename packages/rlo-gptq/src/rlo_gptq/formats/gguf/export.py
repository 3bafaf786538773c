"""One of our checkpoints as a GGUF file: codes and scales as they are, nothing rounded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.checkpoint.hf_quantizer import RLOGPTQConfig
from rlo_gptq.checkpoint.load import weight_bytes
from rlo_gptq.checkpoint.outside import outside_modules
from rlo_gptq.formats.export import Checkpoint
from rlo_gptq.formats.gguf.architecture import architecture_of
from rlo_gptq.formats.gguf.blocks import pack_blocks
from rlo_gptq.formats.gguf.finish import FileOf
from rlo_gptq.formats.gguf.grids import BlockGrid
from rlo_gptq.formats.gguf.types import BLOCK_TYPES, BlockType, GGUFError
from rlo_gptq.formats.gguf.writer import check_library
from rlo_gptq.formats.gptq import GridLayer

_AGAIN = "quantize the model again with --format gguf --type, which rounds onto such a type's grid"
# Codes of b bits fill blocks of b bits: symmetric ones, and those with an offset.
_KINDS = {4: ("Q4_0", "Q4_1"), 5: ("Q5_0", "Q5_1"), 8: ("Q8_0", "")}


def exact_type(layer: GridLayer, name: str) -> BlockType:
    """Return the block type that holds a layer's codes and scales.

    Raises:
        GGUFError: none does; the message says why and what works instead.
    """
    if layer.bits not in _KINDS:
        raise GGUFError(
            f"GGUF blocks with one scale hold 4, 5 or 8 bits, got {layer.bits} bits; {_AGAIN}"
        )
    width = layer.codes.shape[1]
    blocks = layer.group_of[: width // 32 * 32].view(-1, 32)
    if width % 32 or bool((blocks != blocks[:, :1]).any()):
        raise GGUFError(
            f"layer {name!r}: groups must be made of whole blocks of 32 columns, got width {width} "
            f"in {layer.scales.shape[1]} groups; {_AGAIN}"
        )
    middle = float(1 << (layer.bits - 1))
    symmetric, offset = _KINDS[layer.bits]
    if bool((layer.zeros == middle).all()):
        return BLOCK_TYPES[symmetric]
    if not offset:
        raise GGUFError(f"layer {name!r}: Q8_0 is symmetric, and this grid is not; {_AGAIN}")
    return BLOCK_TYPES[offset]


def pack_exactly(layer: GridLayer, kind: BlockType) -> Tensor:
    """Return the bytes of a layer; an offset is rounded to half precision, scales are in it."""
    first = layer.group_of[:: kind.columns]
    scales = layer.scales[:, first].T.contiguous()
    ones = torch.ones_like(scales)
    offsets = (layer.scales * layer.zeros)[:, first].T if kind.mins else torch.zeros_like(scales)
    grid = BlockGrid(kind, scales, ones, offsets.contiguous(), ones if kind.mins else 0 * ones)
    return pack_blocks(layer.codes.T.to(torch.float32), grid)


def write_export(folder: Path, out: Path, config: RLOGPTQConfig) -> tuple[int, int]:
    """Write the GGUF file of a checkpoint into the folder `out`; returns layers and bytes.

    Embedding and head are rounded to Q8_0.

    Args:
        folder: The checkpoint.
        out: The folder of the file.
        config: Its `quantization_config`.

    Raises:
        GGUFError: no block type holds it.
    """
    check_library()
    checkpoint = Checkpoint(folder, config)
    architecture_of(checkpoint.model_config)
    if config.layer_settings.scale_dtype != "float16":
        raise GGUFError(
            f"scales must be float16 for GGUF, got {config.layer_settings.scale_dtype}; {_AGAIN}"
        )
    loads: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, BlockType] = {}
    stored: dict[str, torch.dtype] = {}
    outside = outside_modules(config.outside)
    for file_name, tensors in checkpoint.shards():  # embedding and head dense
        path, keys = folder / file_name, list(tensors)
        layers = [key.removesuffix(".scales") for key in keys if key.endswith(".scales")]
        for name in layers:
            layer = checkpoint.layer(name, tensors)
            kinds[name] = exact_type(layer, name)
            shapes[f"{name}.weight"] = tuple(layer.codes.shape)
            loads[f"{name}.weight"] = partial(_packed, checkpoint, path, name, kinds[name])
        for key in keys:
            owner, _, part = key.rpartition(".")
            if owner not in kinds or part == "bias":
                shapes[key], stored[key] = tuple(tensors[key].shape), tensors[key].dtype
                unpacked = owner in outside
                loads[key] = (
                    partial(_given, tensors[key]) if unpacked else partial(_dense, path, key)
                )
    names = {kind.name for kind in kinds.values()}
    main = next(iter(names)) if len(names) == 1 else "Q4_1"
    by_name = _by_gguf_name(checkpoint.model_config, kinds)

    def kind_of(tensor: str, columns: int) -> str:
        return by_name.get(tensor, "F16" if columns % 32 else "Q8_0")

    writer = FileOf(checkpoint.model_config, folder, kind_of, kind=main, origin=None, stored=stored)
    file = out / f"{folder.name}-{main}.gguf"
    writer.write(file, shapes, loads, packed=set(kinds), base=folder.name)
    return len(kinds), weight_bytes(out)


def _by_gguf_name(config: Mapping[str, object], kinds: Mapping[str, BlockType]) -> dict[str, str]:
    from rlo_gptq.formats.gguf.architecture import tensor_name

    architecture = architecture_of(config)
    return {tensor_name(architecture, f"{n}.weight"): kind.name for n, kind in kinds.items()}


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _dense(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(key)
    return tensor


def _packed(checkpoint: Checkpoint, path: Path, name: str, kind: BlockType) -> Tensor:
    with safe_open(path, framework="pt") as handle:
        keys = [key for key in handle.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        tensors = {key: handle.get_tensor(key) for key in keys}
    return pack_exactly(checkpoint.layer(name, tensors), kind)
