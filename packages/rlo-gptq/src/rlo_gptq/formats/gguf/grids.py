"""The grids of GGUF's block types, as the rounding algorithms see them: transposed, (d, m)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlo_gptq.formats.gguf.types import BlockType

if TYPE_CHECKING:
    from rlo_gptq.rounding.greedy import Rounding


def level_tables(kind: BlockType, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the levels of a type that has some, and the code of the nearest to each half-step."""
    levels = torch.tensor(kind.levels, dtype=like.dtype, device=like.device)
    # Midpoints between integer levels are half-integers: between two of them the code is constant.
    at = torch.arange(-256, 256, dtype=like.dtype, device=like.device) / 2 + 0.25
    return levels, torch.bucketize(at, (levels[1:] + levels[:-1]) / 2)


def half_steps(x: Tensor) -> Tensor:
    """Return the number of the half-step in -128..128 that each value is in, from 0."""
    return (2 * x).floor_().clamp_(-256, 255).add_(256).to(torch.int64)


class BlockGrid:
    r"""Values :math:`d\,s_g\,u(c) - d_{min}\,m_g` of codes c; g is the sub-block of a column.

    What `rlo_gptq.rounding` calls the scales is d alone, so that a refit of scales after rounding
    moves d and leaves the integers of the sub-blocks as they were fitted.

    Args:
        kind: Of the blocks.
        scales: d, (d / columns, m), at least 0, values that half precision holds.
        subs: s, (d / group, m), integers.
        offsets: d_min, (d / columns, m), in half precision.
        mins: m, (d / group, m), integers.
    """

    def __init__(
        self, kind: BlockType, scales: Tensor, subs: Tensor, offsets: Tensor, mins: Tensor
    ) -> None:
        self.kind = kind
        self.subs, self.offsets, self.mins = subs, offsets, mins
        self.zeros = torch.zeros_like(scales)
        self.top = float(kind.top)
        blocks, self._ratio = len(scales), kind.columns // kind.group
        columns = torch.arange(blocks * kind.columns, device=scales.device)
        self.group = columns // kind.columns
        self._of = (columns // kind.group).tolist()
        self._sub_of = columns // kind.group
        self._levels, self._nearest = level_tables(kind, scales)
        self.set_scales(scales)

    def set_scales(self, scales: Tensor, *, offsets: Tensor | None = None) -> None:
        """Replace d, and d_min too if it is given, both (d / columns, m)."""
        self.scales = scales
        if offsets is not None:
            self.offsets = offsets
        self.steps = scales.repeat_interleave(self._ratio, 0) * self.subs
        self.floors = self.offsets.repeat_interleave(self._ratio, 0) * self.mins
        inverse = torch.where(self.steps != 0, 1 / self.steps, torch.zeros_like(self.steps))
        self._inverse = inverse
        self._shift = self.floors * inverse + self.kind.zero
        self._rows = list(zip(inverse, self._shift, self.steps, self.floors, strict=True))

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j, all (m,)."""
        inverse, shift, step, floor = self._rows[self._of[j]]
        if self.kind.levels:
            found = self._nearest[half_steps(x * inverse)]
            code.copy_(found)
            torch.mul(self._levels[found], step, out=value)
            return
        torch.addcmul(shift, x, inverse, out=code)
        code.round_().clamp_(0, self.top)
        torch.sub(code, self.kind.zero, out=value)
        value.mul_(step)
        if self.kind.mins:
            value.sub_(floor)

    def improve_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j: nothing is nearer."""
        self.round_column(x, j, code, value)

    def round_all(self, x: Tensor) -> Tensor:
        """Return the nearest codes (d, m) of x (d, m)."""
        group = self._sub_of
        if self.kind.levels:
            return self._nearest[half_steps(x * self._inverse[group])].to(x.dtype)
        at = torch.addcmul(self._shift[group], x, self._inverse[group])
        return at.round_().clamp_(0, self.top)

    def units(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return what a change of d multiplies, s u(c), (n, m)."""
        return self._unit(codes).mul_(self.subs[self._sub_of[columns]])

    def offset_units(self, columns: Tensor) -> Tensor:
        """Return what a change of d_min multiplies, -m, for some columns, (n, m)."""
        return -self.mins[self._sub_of[columns]]

    def refit(self, state: Rounding) -> bool:
        """Move scales and offsets together after rounding; return whether there are offsets."""
        if not self.kind.mins:
            return False
        from rlo_gptq.formats.gguf.refit import refit_blocks

        refit_blocks(state, self)
        return True

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return the values (n, m) of the codes (n, m) of some columns, (n,).

        In the order of operations of llama.cpp, so that they are the file's, to the bit.
        """
        group = self._sub_of[columns]
        value = self._unit(codes).mul_(self.steps[group])
        return value.sub_(self.floors[group]) if self.kind.mins else value

    def _unit(self, codes: Tensor) -> Tensor:
        if self.kind.levels:
            return self._levels[codes.to(torch.int64)]
        return codes - float(self.kind.zero)

    def join(self, others: Sequence[BlockGrid]) -> BlockGrid:
        """Return the grid of this one's outputs and those of others, along m."""
        grids = (self, *others)
        names = ("scales", "subs", "offsets", "mins")
        return BlockGrid(
            self.kind, *(torch.cat([getattr(grid, name) for grid in grids], 1) for name in names)
        )
