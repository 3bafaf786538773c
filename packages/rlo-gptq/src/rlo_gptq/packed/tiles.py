"""A packed weight unpacked a tile of rows at a time, and the product that uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlo_gptq.packed.unpack_table import unpack_values

TILE_ELEMENTS = 1 << 20
"""Weights that are dense at one time: 4 MiB in float32, which a processor's cache can hold."""


def dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    *,
    bits: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return `scale * (code - zero)` for some rows, computed in float32, as `dtype`.

    Args:
        packed: Shape (rows, words), int32.
        scales: Shape (rows, groups), floating.
        zeros: Like `scales`, or one number for all.
        bits: Bits of a code.
        columns: Weights in a row.
        group_size: Columns that share a scale; less than 1 for all of them.
        dtype: Of the result.

    Returns:
        Shape (rows, columns).
    """
    zero = 0.0 if isinstance(zeros, Tensor) else zeros
    values = unpack_values(packed, bits, columns, zero)
    groups = scales.shape[1]
    if groups > 1 and columns % group_size == 0:  # a scale for each slice, without repeating it
        values = values.reshape(len(packed), groups, -1)
        scales = scales.unsqueeze(-1)
        zeros = zeros.unsqueeze(-1) if isinstance(zeros, Tensor) else zeros
    elif groups > 1:
        scales = scales.repeat_interleave(group_size, 1)[:, :columns]
        if isinstance(zeros, Tensor):
            zeros = zeros.repeat_interleave(group_size, 1)[:, :columns]
    if isinstance(zeros, Tensor):
        values = values.sub_(zeros.float())
    return values.mul_(scales.float()).reshape(len(packed), columns).to(dtype)


CUDA_TILE_ELEMENTS = 1 << 24
"""The same on a GPU, where a tile costs launches: 32 MiB in half precision."""


def weight_tiles(
    rows: int, columns: int, device: torch.device | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of rows that are unpacked at one time."""
    on_gpu = device is not None and device.type == "cuda"
    step = max(1, (CUDA_TILE_ELEMENTS if on_gpu else TILE_ELEMENTS) // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class PackedMatmul(torch.autograd.Function):
    """x W^T with W packed; the gradient goes to x alone, and W is unpacked again for it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Callable[[int, int], Tensor],
        outputs: int,
        units: Callable[[int, int], Tensor] | None,
        scales: Tensor | None,
    ) -> Tensor:
        ctx.rows, ctx.outputs, ctx.columns = rows, outputs, x.shape[1]
        y = x.new_empty(x.shape[0], outputs)
        for start, stop in weight_tiles(outputs, x.shape[1], x.device):
            tile = rows(start, stop) if units is None else units(start, stop)
            torch.mm(x, tile.T, out=y[:, start:stop])
        return y if scales is None else y.mul_(scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        total = grad.new_zeros(grad.shape[0], ctx.columns)
        for start, stop in weight_tiles(ctx.outputs, ctx.columns, grad.device):
            total.addmm_(grad[:, start:stop], ctx.rows(start, stop))
        return total, None, None, None, None
