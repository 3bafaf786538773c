"""A GPTQ checkpoint that someone else made, as one of ours: for evaluation and for finetuning on
it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.checkpoint.load import load, quantization_config
from rlo_gptq.checkpoint.validation import (
    check_folder,
    check_sizes,
    read_headers,
    read_object,
    weight_paths,
)
from rlo_gptq.formats.compressed import group_size_of
from rlo_gptq.formats.export import linear_widths
from rlo_gptq.formats.gptq import (
    GPTQ_BITS,
    CheckpointFormat,
    FormatError,
    GridLayer,
    is_symmetric,
    unpack_layer,
)
from rlo_gptq.models.shards import ShardWriter, new_folder, tensor_names
from rlo_gptq.packed.packing import pack_codes
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the folder, the settings read off the checkpoint, and its layers."""

    folder: Path
    settings: LayerSettings
    layers: int


def import_checkpoint(folder: Path, out: Path) -> Imported:
    """Write a GPTQ checkpoint (version 1 or 2, 2/3/4/8 bits) in our format, shard by shard.

    Codes, scales and zeros carry over exactly, so that the outputs are the same to rounding.

    Args:
        folder: With `config.json` or `quantize_config.json`, and safetensors files.
        out: The new folder; must not exist, or be empty.

    Raises:
        FormatError: it is not a GPTQ checkpoint, or one of a form that ours cannot hold (groups of
            different lengths in one layer); nothing is left behind.
    """
    check_folder(folder)
    config = read_object(folder / "config.json")
    found = _quantization(folder, config)
    bits, checkpoint_format = _read_bits(found)
    with new_folder(out, FormatError) as partial:
        settings, layers = _write(folder, partial, config, bits, checkpoint_format)
    return Imported(out, settings, layers)


def open_gptq(
    folder: str | Path, *, dtype: torch.dtype | str = "auto", device_map: Any = None
) -> PreTrainedModel:
    """Load a GPTQ checkpoint as a packed model; transformers would need GPTQModel, and half
    precision.

    Args:
        folder: As `import_checkpoint`.
        dtype: As `rlo_gptq.checkpoint.load.load`.
        device_map: Likewise.
    """
    with tempfile.TemporaryDirectory(prefix="rlo-gptq-") as scratch:
        ours = import_checkpoint(Path(folder), Path(scratch) / "imported").folder
        return load(ours, dtype=dtype, device_map=device_map)


def _quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    if found is None and (folder / "quantize_config.json").is_file():
        found = read_object(folder / "quantize_config.json")
    if not isinstance(found, dict):
        raise FormatError(f"{str(folder)!r} must have a GPTQ quantization_config, got {found!r}")
    # Old quantize_config.json files name no method: they are GPTQ's own.
    if found.get("quant_method", "gptq") != "gptq":
        raise FormatError(f"quant_method must be 'gptq', got {found['quant_method']!r}")
    return found


def _read_bits(found: Mapping[str, Any]) -> tuple[int, CheckpointFormat]:
    bits = found.get("bits")
    if type(bits) is not int or bits not in GPTQ_BITS:
        raise FormatError(f"bits must be 2, 3, 4 or 8, got {bits!r}")
    name = found.get("checkpoint_format") or found.get("format") or "gptq"
    if name == "gptq":
        return bits, "gptq"
    if name == "gptq_v2":
        return bits, "gptq_v2"
    raise FormatError(f"checkpoint_format must be 'gptq' or 'gptq_v2', got {name!r}")


def _write(
    folder: Path, out: Path, config: dict[str, Any], bits: int, checkpoint_format: CheckpointFormat
) -> tuple[LayerSettings, int]:
    paths = weight_paths(folder)
    check_sizes(config, read_headers(paths))
    files = {path.name: tensor_names(path) for path in paths}
    where = {name: file for file, names in files.items() for name in names}
    layers = sorted(name.removesuffix(".qweight") for name in where if name.endswith(".qweight"))
    if not layers:
        raise FormatError(f"{str(folder)!r} has no layer with a qweight")

    def read(name: str) -> Tensor:
        with safe_open(folder / where[name], framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor

    def layer_of(name: str) -> GridLayer:
        parts = {p: read(f"{name}.{p}") for p in _PARTS if f"{name}.{p}" in where}
        return unpack_layer(name, parts, bits=bits, checkpoint_format=checkpoint_format)

    permuted = False
    widths = linear_widths(folder)
    blocks, modules = _module_table(layers, widths)
    sym, sizes = True, dict[str, tuple[int, int]]()
    for name in layers:
        layer = layer_of(name)
        if widths.get(name) != layer.codes.shape[1]:
            raise FormatError(
                f"layer {name!r} must have {widths.get(name, 'no')} inputs in this model's class, "
                f"got {layer.codes.shape[1]}"
            )
        sym = sym and is_symmetric(layer)
        ordered, order = in_runs(layer)
        permuted = permuted or order is not None
        sizes[name] = (group_size_of(name, ordered), layer.codes.shape[1])
    settings = LayerSettings(
        bits=bits, method="gptq", group_size=_one_size(sizes), sym=sym, integer_zero=True
    )
    writer = ShardWriter(out, digests=True)
    for file, names in files.items():
        new: dict[str, Tensor] = {}
        for name in names:
            owner, _, part = name.rpartition(".")
            if f"{owner}.qweight" not in where or part == "bias":
                new[name] = read(name)
            elif part == "qweight":
                new.update(_packed(owner, layer_of(owner), settings, permuted=permuted))
        writer.add(file, new)
    quantization = quantization_config(settings, blocks=blocks, modules=modules, permuted=permuted)
    writer.finish({**config, "quantization_config": quantization}, texts=folder)
    return settings, len(layers)


def _one_size(sizes: Mapping[str, tuple[int, int]]) -> int:
    """Return the group size of all layers, given those of each and its width.

    One group for a row is also one of any size that is as wide as the row.
    """
    grouped = {size for size, _ in sizes.values() if size > 0}
    size = grouped.pop() if len(grouped) == 1 else -1
    if grouped or (size > 0 and any(own < 0 and width > size for own, width in sizes.values())):
        found = sorted({own for own, _ in sizes.values()})
        raise FormatError(f"layers must share one group size, got {found}")
    return size


def in_runs(layer: GridLayer) -> tuple[GridLayer, Tensor | None]:
    """Return the layer with each group's columns side by side, and their order if it changed.

    GPTQ with act-order numbers groups in the order in which columns were rounded, so that the
    columns of a group are anywhere.
    """
    order = torch.argsort(layer.group_of, stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return layer, None
    moved = replace(layer, codes=layer.codes[:, order], group_of=layer.group_of[order])
    return moved, order


def _packed(
    name: str, layer: GridLayer, settings: LayerSettings, *, permuted: bool
) -> dict[str, Tensor]:
    layer, order = in_runs(layer)
    tensors = {
        f"{name}.weight": pack_codes(layer.codes, settings.bits),
        f"{name}.scales": layer.scales.to(getattr(torch, settings.scale_dtype)),
    }
    if permuted:
        natural = torch.arange(layer.codes.shape[1])
        tensors[f"{name}.order"] = (natural if order is None else order).to(torch.int32)
    if not settings.sym:
        tensors[f"{name}.zeros"] = layer.zeros.to(getattr(torch, settings.scale_dtype))
    return tensors


def _module_table(
    layers: list[str], widths: Mapping[str, int]
) -> tuple[str, dict[str, list[int] | None]]:
    """Return the path of the blocks, and for each layer inside a block the blocks that have it."""
    blocks = ""
    where: dict[str, list[int]] = {}
    for name in layers:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            raise FormatError(f"layer {name!r} must be inside a numbered decoder block")
        path = ".".join(parts[:number])
        if blocks and path != blocks:
            raise FormatError(f"layers must be in one list of blocks, got {blocks!r} and {path!r}")
        blocks = path
        index = int(parts[number])
        where.setdefault(".".join(parts[number + 1 :]), []).append(index)
    count = len(
        {n[len(blocks) + 1 :].partition(".")[0] for n in widths if n.startswith(f"{blocks}.")}
    )
    return blocks, {n: None if len(i) == count else sorted(i) for n, i in where.items()}
