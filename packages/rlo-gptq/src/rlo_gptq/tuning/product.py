r"""x W^T with W packed and :math:`W = s (C - z)`: gradients of x, s, z, a tile of rows at a time.

What `packed/tiles.py` does for inputs alone. With one scale for a row the gradient of s is a sum
over tokens of the outputs, which are there; with groups each tile's own gradient is summed over the
columns of each group, and then given up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_gptq.packed.tiles import weight_tiles
from rlo_gptq.rounding.grids import inverse_of

Units = Callable[[int, int], Tensor]
"""Gives C of a range of rows, (some, d), float32."""


def spread(grid: Tensor, size: int, columns: int) -> Tensor:
    """Return (n, groups) as (n, columns): each group's number for all of its columns."""
    if grid.shape[1] == 1:
        return grid.expand(-1, columns)
    return grid.unsqueeze(-1).expand(-1, -1, size).reshape(len(grid), -1)[:, :columns]


def _group_sums(x: Tensor, size: int, groups: int) -> Tensor:
    """Return the sums of x (n, columns) over the columns of each group, (n, groups)."""
    return F.pad(x, (0, groups * size - x.shape[1])).view(len(x), groups, size).sum(-1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, zeros: Tensor | None, units: Units, size: int
    ) -> Tensor:
        n, d = x.shape
        y = x.new_empty(n, len(scales))
        for start, stop in weight_tiles(len(scales), d):
            weight = _tile(units, start, stop, scales, zeros, size)
            torch.mm(x, weight.T, out=y[:, start:stop])
        ctx.units, ctx.size = units, size
        ctx.save_for_backward(x, scales, zeros, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scales, zeros, y = ctx.saved_tensors
        size, (rows, groups) = ctx.size, scales.shape
        to_x, to_scales, to_zeros = ctx.needs_input_grad[:3]
        of_x = torch.zeros_like(x) if to_x else None
        of_scales = torch.zeros_like(scales) if to_scales and groups > 1 else None
        of_zeros = torch.zeros_like(scales) if to_zeros and groups > 1 else None
        for start, stop in weight_tiles(rows, x.shape[1]):
            part = slice(start, stop)
            if of_x is not None:
                of_x.addmm_(grad[:, part], _tile(ctx.units, start, stop, scales, zeros, size))
            if of_scales is None and of_zeros is None:
                continue
            slope = grad[:, part].T @ x
            if of_zeros is not None:
                of_zeros[part] = -scales[part] * _group_sums(slope, size, groups)
            if of_scales is not None:
                unit = ctx.units(start, stop)
                if zeros is not None:
                    unit = unit - spread(zeros[part], size, unit.shape[1])
                of_scales[part] = _group_sums(slope.mul_(unit), size, groups)
        if groups == 1:
            if to_scales:  # y is the scale times what the scale's gradient wants; 0 stays 0
                sums = torch.linalg.vecdot(grad, y, dim=0)
                of_scales = (sums * inverse_of(scales[:, 0])).unsqueeze(1)
            if to_zeros:
                of_zeros = -scales * (grad.T @ x.sum(1, keepdim=True))
        return of_x, of_scales, of_zeros, None, None


def _tile(
    units: Units, start: int, stop: int, scales: Tensor, zeros: Tensor | None, size: int
) -> Tensor:
    unit = units(start, stop)
    d = unit.shape[1]
    if zeros is not None:
        unit = unit - spread(zeros[start:stop], size, d)
    return unit * spread(scales[start:stop], size, d)


def tiled_product(
    x: Tensor, scales: Tensor, zeros: Tensor | None, units: Units, group_size: int
) -> Tensor:
    r"""Return :math:`x W^T`, (n, m), of which W is never dense as a whole.

    Args:
        x: (n, d), float32.
        scales: s (m, groups), float32.
        zeros: z, likewise; None where C has none.
        units: Gives C by rows.
        group_size: Columns of a group, where there are several.
    """
    product: Tensor = _Product.apply(x, scales, zeros, units, group_size)
    return product
