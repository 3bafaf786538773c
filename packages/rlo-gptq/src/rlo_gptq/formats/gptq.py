r"""The GPTQ on-disk format of one linear layer, for auto-gptq, GPTQModel, transformers and vLLM.

`qweight` int32 (in * bits / 32, out), a stream down the input axis; `qzeros` int32
(groups, out * bits / 32), the same stream along the output axis; `scales` float16 (groups, out);
`g_idx` int32 (in). :math:`W_{oi} = s_{g_i o} (q_{io} - z_{g_i o})`.

Version 1 (`checkpoint_format: gptq`) stores z - 1, version 2 (`gptq_v2`) stores z. Readers of
version 1 add the 1 back inside the code's own bits, where a zero of 0 wraps round: transformers and
auto-gptq then return logits that are off by 0.5 to 1.4 (measured) without a word. So version 1 is
written only for the symmetric zero 2^(bits-1), which cannot wrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from rlo_core.errors import RLOError
from torch import Tensor

from rlo_gptq.packed.packing import WORD, pack_codes, unpack_codes

GPTQ_BITS = (2, 3, 4, 8)
CheckpointFormat = Literal["gptq", "gptq_v2"]


class FormatError(RLOError):
    """A layer or checkpoint that a format cannot hold, or that is not of that format."""


@dataclass(frozen=True)
class GridLayer:
    """One linear layer on a uniform grid with integer zeros: what GPTQ-like formats can hold.

    Args:
        codes: (out, in) uint8, in [0, 2^bits - 1].
        scales: (out, groups) floating.
        zeros: (out, groups) floating, whole numbers in [0, 2^bits - 1].
        group_of: (in) int64, the group of each input column.
        bits: 2, 3, 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """Return the weight, (out, in) float32."""
        scales = self.scales.float()[:, self.group_of]
        return scales * (self.codes.float() - self.zeros.float()[:, self.group_of])


def check_widths(name: str, out_features: int, in_features: int) -> None:
    """Raise FormatError with the layer's name for a shape that readers of GPTQ do not take."""
    # The readers' kernels take whole blocks of 32 on both axes, whatever the bit width.
    for axis, size in (("input", in_features), ("output", out_features)):
        if size % WORD:
            raise FormatError(
                f"layer {name!r}: its {axis} width must be a multiple of 32 for the GPTQ format, "
                f"got {size}; leave it out with --skip '*.{name.rpartition('.')[2]}'; "
                "compressed-tensors and our own format take any width"
            )


def check_layer(name: str, layer: GridLayer) -> None:
    """Raise FormatError with the layer's name if the GPTQ format cannot hold it."""
    out_features, in_features = layer.codes.shape
    if layer.bits not in GPTQ_BITS:
        raise FormatError(f"layer {name!r}: bits must be 2, 3, 4 or 8 for GPTQ, got {layer.bits}")
    check_widths(name, out_features, in_features)
    zeros = layer.zeros
    if bool((zeros != zeros.round()).any()):
        raise FormatError(
            f"layer {name!r}: the GPTQ format needs integer zeros, got "
            f"{float(zeros.flatten()[0])}; quantize with --format gptq (or --integer-zero)"
        )
    if bool((zeros < 0).any()) or bool((zeros > (1 << layer.bits) - 1).any()):
        raise FormatError(
            f"layer {name!r}: zeros must be in [0, {(1 << layer.bits) - 1}], got "
            f"[{float(zeros.min())}, {float(zeros.max())}]"
        )


def is_symmetric(layer: GridLayer) -> bool:
    """Whether every zero is 2^(bits-1), the only case that version 1 stores safely."""
    return bool((layer.zeros == 1 << (layer.bits - 1)).all())


def pack_layer(
    name: str, layer: GridLayer, checkpoint_format: CheckpointFormat
) -> dict[str, Tensor]:
    """Return the tensors of one layer, by suffix: qweight, qzeros, scales, g_idx.

    Raises:
        FormatError: the format cannot hold it; the message has the layer's name.
    """
    check_layer(name, layer)
    if checkpoint_format == "gptq" and not is_symmetric(layer):
        raise FormatError(
            f"layer {name!r}: GPTQ version 1 must have zeros of {1 << (layer.bits - 1)}, got "
            f"[{int(layer.zeros.min())}, {int(layer.zeros.max())}], which readers misread "
            "without a word; write version 2 (gptq_v2)"
        )
    stored = layer.zeros.to(torch.int64) - (1 if checkpoint_format == "gptq" else 0)
    scales = layer.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise FormatError(f"layer {name!r}: scales must be finite in float16")
    return {
        "qweight": pack_codes(layer.codes, layer.bits).t().contiguous(),
        "qzeros": pack_codes(stored.t(), layer.bits),
        "scales": scales.t().contiguous(),
        "g_idx": layer.group_of.to(torch.int32),
    }


def unpack_layer(
    name: str, tensors: dict[str, Tensor], *, bits: int, checkpoint_format: CheckpointFormat
) -> GridLayer:
    """Return the layer that GPTQ tensors hold; every shape and index is checked first.

    Args:
        name: The layer's name, for messages.
        tensors: By suffix: qweight, qzeros, scales and, if it is there, g_idx.
        bits: 2, 3, 4 or 8.
        checkpoint_format: "gptq" adds back the 1 that version 1 takes off the zeros.

    Raises:
        FormatError: a tensor is missing, of the wrong shape or dtype, or an index is out of range.
    """
    missing = [key for key in ("qweight", "qzeros", "scales") if key not in tensors]
    if missing:
        raise FormatError(f"layer {name!r} lacks {', '.join(missing)}")
    qweight, qzeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
    for key, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise FormatError(f"{name}.{key} must be a matrix, got shape {tuple(tensor.shape)}")
    groups, out_features = scales.shape
    in_features = qweight.shape[0] * WORD // bits
    if not scales.is_floating_point() or not bool(torch.isfinite(scales.float()).all()):
        raise FormatError(f"{name}.scales must be finite floating point, got {scales.dtype}")
    if qweight.shape[1] != out_features:
        raise FormatError(
            f"{name}.qweight must have {out_features} columns as scales has, got {qweight.shape[1]}"
        )
    group_of = tensors.get("g_idx")
    if group_of is None:
        group_of = torch.arange(in_features) // -(-in_features // groups)
    if tuple(group_of.shape) != (in_features,) or group_of.is_floating_point():
        raise FormatError(
            f"{name}.g_idx must be integer of shape ({in_features},), got {group_of.dtype} "
            f"{tuple(group_of.shape)}"
        )
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise FormatError(
            f"{name}.g_idx must be in [0, {groups}), got "
            f"[{int(group_of.min())}, {int(group_of.max())}]"
        )
    try:
        codes = unpack_codes(qweight.t(), bits, in_features)
        zeros = unpack_codes(qzeros, bits, out_features).t().to(torch.int16)
    except ValueError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    if zeros.shape[1] != groups:
        raise FormatError(
            f"{name}.qzeros must have {groups} rows as scales has, got {zeros.shape[1]}"
        )
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)  # what the readers compute, wrapping included
    return GridLayer(codes, scales.t().float(), zeros.float(), group_of.long(), bits)
