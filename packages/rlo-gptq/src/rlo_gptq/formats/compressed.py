"""The compressed-tensors `pack-quantized` format of one linear layer: what vLLM serves at 2 and 3
bits.

`weight_packed` int32, codes less 2^(bits-1) as a dense stream along the input axis; `weight_scale`
(out, groups); `weight_shape` int64 (2); and for an asymmetric grid `weight_zero_point`, zeros less
2^(bits-1), packed along the output axis. The packing is the library's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlo_gptq.formats.gptq import FormatError, GridLayer, is_symmetric


def check_library() -> None:
    """Raise FormatError with the way out if compressed-tensors is not installed."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise FormatError(
            "--format compressed-tensors needs the package compressed-tensors; "
            "pip install 'rlo-gptq[compressed-tensors]'"
        )


def group_size_of(name: str, layer: GridLayer) -> int:
    """Return the layer's group size, -1 for one group per row.

    Raises:
        FormatError: the groups are not runs of columns of one length.
    """
    in_features = layer.codes.shape[1]
    groups = layer.scales.shape[1]
    if groups == 1:
        return -1
    size = in_features // groups
    regular = torch.arange(in_features, device=layer.group_of.device) // size
    if size * groups != in_features or not torch.equal(layer.group_of, regular):
        raise FormatError(
            f"layer {name!r}: groups must be runs of equal length, got {groups} groups over "
            f"{in_features} columns; choose a group size that divides the width, and no act-order"
        )
    return size


def pack_layer(
    name: str, layer: GridLayer, *, symmetric: bool, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Return the tensors of one layer by suffix; `weight_zero_point` only if not `symmetric`.

    Args:
        name: The layer's name, for messages.
        layer: The layer; its zeros have to be integers.
        symmetric: Whether the format is to have no zero points; all zeros must then be 2^(bits-1).
        dtype: Of the scales, the model's own.

    Raises:
        FormatError: the format cannot hold the layer.
    """
    check_library()
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    group_size_of(name, layer)
    if bool((layer.zeros != layer.zeros.round()).any()):
        raise FormatError(
            f"layer {name!r}: compressed-tensors needs integer zeros, got "
            f"{float(layer.zeros.flatten()[0])}; quantize with --format compressed-tensors"
        )
    half = 1 << (layer.bits - 1)
    if symmetric and not is_symmetric(layer):
        raise FormatError(f"layer {name!r}: zeros must all be {half} for a symmetric grid")
    tensors = {
        "weight_packed": pack_to_int32((layer.codes.to(torch.int16) - half).char(), layer.bits),
        "weight_scale": layer.scales.to(dtype),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not symmetric:
        zeros = (layer.zeros.to(torch.int16) - half).char()
        tensors["weight_zero_point"] = pack_to_int32(zeros, layer.bits, packed_dim=0).contiguous()
    return tensors


def quantization_config(
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ignore: Sequence[str],
    others: Mapping[int, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose linears have these settings.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: -1 for one group per row.
        symmetric: Whether there are no zero points.
        ignore: Names of linear modules that are left as they are, e.g. `lm_head`.
        others: Bits of layers that have their own, and patterns of their names; readers take a
            pattern of names before the class of a module.
    """
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "dynamic": False,
    }
    if group_size != -1:
        weights["group_size"] = group_size
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    for number, (own, targets) in enumerate((others or {}).items(), 1):
        groups[f"group_{number}"] = {
            "targets": list(targets),
            "weights": {**weights, "num_bits": own},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }
