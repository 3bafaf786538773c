"""The grid of a trellis: what the rounding algorithms ask for, a column at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlo_gptq.rounding.grids import column_groups, stored
from rlo_gptq.rounding.trellis import Trellis, decode
from rlo_gptq.rounding.viterbi import encode
from rlo_gptq.settings import LayerSettings


class TrellisGrid:
    """Trellis-coded values: value = scale * v(state), one scale per row, group or matrix.

    Args:
        scales: (groups, m).
        group: (d,) int64, the group of each column.
        trellis: Of the codes.
    """

    def __init__(self, scales: Tensor, group: Tensor, trellis: Trellis) -> None:
        self.group, self.trellis = group, trellis
        self.zeros = torch.zeros_like(scales)
        self._of = group.tolist()
        self.set_scales(scales)

    def set_scales(self, scales: Tensor) -> None:
        """Replace the scales, (groups, m)."""
        self.scales = scales
        self._inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write nearly the best codes and their values of column j, all (m,)."""
        g = self._of[j]
        found = encode(x * self._inverse[g], self.scales[g].square(), self.trellis)
        code.copy_(found)
        torch.mul(decode(found, self.trellis).to(value.dtype), self.scales[g], out=value)

    def improve_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the new codes of those sequences that come nearer to x, and keep the others."""
        g = self._of[j]
        old_code = code.clone()
        old = decode(old_code, self.trellis).to(value.dtype) * self.scales[g]
        self.round_column(x, j, code, value)
        gain = (x - old).square() - (x - value).square()
        parts = torch.split_with_sizes(gain, self.trellis.lengths(len(x)))
        kept = torch.cat([part.sum().expand(len(part)) > 0 for part in parts])
        torch.where(kept, code, old_code, out=code)
        torch.where(kept, value, old, out=value)

    def round_all(self, x: Tensor) -> Tensor:
        """Return codes (d, m) of x (d, m), column by column."""
        codes, value = torch.empty_like(x), torch.empty_like(x[0])
        for j in range(len(x)):
            self.round_column(x[j], j, codes[j], value)
        return codes

    def units(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return v(state), (n, m)."""
        return decode(codes, self.trellis).to(self.scales.dtype)

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return scale * v(state), (n, m)."""
        return self.units(codes, columns).mul_(self.scales[self.group[columns]])

    def join(self, others: Sequence[TrellisGrid]) -> TrellisGrid:
        """Return the grid of the outputs of all, along m."""
        scales = torch.cat([grid.scales for grid in (self, *others)], 1)
        return TrellisGrid(scales, self.group, self.trellis)


def fit_trellis(x: Tensor, settings: LayerSettings, trellis: Trellis) -> TrellisGrid:
    """Return a grid whose scales are the root mean squares of targets x (d, m)."""
    d, m = x.shape
    group = column_groups(d, settings.group_size).to(x.device)
    rows = []
    for g in range(int(group[-1]) + 1):
        square = x[group == g].square()
        mean = square.mean().expand(m) if settings.group_size == 0 else square.mean(0)
        rows.append(stored(mean.sqrt(), settings.scale_dtype))
    return TrellisGrid(torch.stack(rows), group, trellis)
