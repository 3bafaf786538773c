r"""Grids of representable values, one (scale, zero) per row, group or matrix.

Inside the rounding code everything is transposed, (d, m): one column of W is then one contiguous
row of memory, which is what an algorithm that visits columns one by one reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlo_gptq.settings import LayerSettings, ScaleDtype

# Half-widths of the search, in units of the root mean square of a row (or group): Gaussian rows
# want 1.5 at 2 bits to 2.9 at 4, and rows with outliers up to their absolute maximum.
_NARROWEST = 0.7
_CANDIDATES = 24
# Weights that are fitted at one time: a core's own cache holds them, and the search reads them two
# hundred times.
_FITTED = 1 << 17


class Grid(Protocol):
    """What the rounding algorithms ask of a grid; columns are numbered as the weight's."""

    scales: Tensor  # (groups, m)
    zeros: Tensor  # (groups, m), in codes
    group: Tensor  # (d,) the group of each column

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j, all (m,)."""

    def improve_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """The same, but never farther from x than the codes given, which it replaces."""

    def round_all(self, x: Tensor) -> Tensor:
        """Return the nearest codes (d, m) of x (d, m)."""

    def set_scales(self, scales: Tensor) -> None:
        """Replace the scales, (groups, m)."""

    def units(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return the values (n, m) before scaling of the codes (n, m) of some columns, (n,)."""

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return the values (n, m) of the codes (n, m) of some columns, (n,)."""

    def join(self, others: Sequence[Any]) -> Grid:
        """Return the grid of this one's outputs and those of other grids of its kind."""


def column_groups(d: int, group_size: int) -> Tensor:
    """Return the group of each column, int64 (d,); -1 and 0 mean one group."""
    if group_size <= 0:
        return torch.zeros(d, dtype=torch.int64)
    return torch.arange(d) // group_size


@dataclass
class ScalarGrid:
    """Uniform levels: value = scale * (code - zero), code in 0..2^bits - 1.

    Args:
        scales: (groups, m), at least 0; 0 makes every value of that group 0.
        zeros: (groups, m), in codes.
        bits: of a code.
        group: (d,) int64, the group of each column.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    group: Tensor
    _of: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.top = float(2**self.bits - 1)
        self._of = self.group.tolist()
        self.set_scales(self.scales)

    def set_scales(self, scales: Tensor) -> None:
        """Replace the scales, (groups, m)."""
        self.scales = scales
        self.inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
        # Lists of rows: indexing a tensor costs more than the arithmetic on 1000 elements.
        self._rows = list(zip(self.inverse, self.zeros, self.scales, strict=True))

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j, all (m,)."""
        inverse, zero, scale = self._rows[self._of[j]]
        torch.addcmul(zero, x, inverse, out=code)
        code.round_().clamp_(0, self.top)
        torch.sub(code, zero, out=value)
        value.mul_(scale)

    def improve_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j: nothing is nearer."""
        self.round_column(x, j, code, value)

    def round_all(self, x: Tensor) -> Tensor:
        """Return the nearest codes (d, m) of x (d, m)."""
        inverse, zero = self.inverse[self.group], self.zeros[self.group]
        return torch.addcmul(zero, x, inverse).round_().clamp_(0, self.top)

    def units(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return code - zero, (n, m)."""
        return codes - self.zeros[self.group[columns]]

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return scale * (code - zero), (n, m)."""
        return self.units(codes, columns).mul_(self.scales[self.group[columns]])

    def join(self, others: Sequence[ScalarGrid]) -> ScalarGrid:
        """Return the grid of the outputs of all, along m."""
        grids = (self, *others)
        scales = torch.cat([grid.scales for grid in grids], 1)
        zeros = torch.cat([grid.zeros for grid in grids], 1)
        return ScalarGrid(scales, zeros, self.bits, self.group)


def stored(x: Tensor, dtype: ScaleDtype) -> Tensor:
    """Return x rounded to the type in which it is stored, in its own type.

    Raises:
        ValueError: a finite value leaves the range of `dtype`.
    """
    kept = x.to(getattr(torch, dtype)).to(x.dtype)
    if not torch.isfinite(kept).all():
        raise ValueError(
            f"scales must fit {dtype}, got {x.abs().max().item():.3g}; use scale_dtype='float32'"
        )
    return kept


def fit_grid(x: Tensor, importance: Tensor, settings: LayerSettings) -> ScalarGrid:
    r"""Return the grid that minimises :math:`\sum_j h_j (x_j - Q(x_j))^2` in every row and group.

    Widths from narrow to the absolute maximum are tried, then the best is refined by two steps of
    least squares; for an asymmetric grid the range keeps its own centre.

    Args:
        x: weights (d, m), transposed.
        importance: h, (d,), at least 0.
        settings: bits, grid kind and the type of scales.

    Returns:
        A grid whose scales and zeros are already rounded to `settings.scale_dtype`.
    """
    d, m = x.shape
    size = settings.group_size if settings.group_size > 0 else d
    starts = range(0, d, size)
    scales = torch.empty(len(starts), m, dtype=x.dtype, device=x.device)
    zeros = torch.empty_like(scales)
    for g, start in enumerate(starts):
        group = slice(start, min(start + size, d))
        # One scale for the matrix has to see all of it; else a part that a cache holds is fitted.
        step = m if settings.group_size == 0 else max(16, _FITTED // (group.stop - group.start))
        for begin in range(0, m, step):
            part = slice(begin, min(begin + step, m))
            scales[g, part], zeros[g, part] = _fit_group(
                x[group, part].contiguous(), importance[group], settings
            )
    return ScalarGrid(scales, zeros, settings.bits, column_groups(d, size).to(x.device))


def _fit_group(x: Tensor, h: Tensor, settings: LayerSettings) -> tuple[Tensor, Tensor]:
    """Search one group of columns; return scale and zero, (m,), or (1,) for one per tensor."""
    top = float(2**settings.bits - 1)
    axes = (0, 1) if settings.group_size == 0 else (0,)
    low, high = x.amin(axes), x.amax(axes)
    rms = x.square().mean(axes).sqrt()
    if settings.sym:
        widest = torch.maximum(high, -low)
        centre = torch.zeros_like(widest)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        centre, widest = (low + high) / 2, (high - low) / 2
    narrowest = torch.minimum(_NARROWEST * rms, widest)
    best_error = torch.full_like(widest, float("inf"))
    best_scale, best_zero = torch.zeros_like(widest), _zero_of(centre, widest, settings)
    unit = torch.empty_like(x)
    for i in range(_CANDIDATES):
        half = narrowest * (widest / narrowest.clamp(min=1e-30)) ** (i / (_CANDIDATES - 1))
        scale = stored(2 * half / top, settings.scale_dtype)
        zero = _zero_of(centre, scale * top / 2, settings)
        error = _error(x, h, scale, zero, top, unit)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    for _ in range(2):
        scale = _least_squares(x, h, best_scale, best_zero, top, unit)
        scale = stored(scale, settings.scale_dtype)
        error = _error(x, h, scale, best_zero, top, unit)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, best_zero


def _zero_of(centre: Tensor, half: Tensor, settings: LayerSettings) -> Tensor:
    top = float(2**settings.bits - 1)
    if settings.sym:
        return torch.full_like(half, (top + 1) / 2 if settings.integer_zero else top / 2)
    scale = 2 * half / top
    zero = torch.where(scale > 0, top / 2 - centre / scale, torch.full_like(half, top / 2))
    if settings.integer_zero:
        return zero.round().clamp(0, top)
    return stored(zero, settings.scale_dtype)


def _units(x: Tensor, scale: Tensor, zero: Tensor, top: float, out: Tensor) -> Tensor:
    """Write code - zero of the nearest codes, (d, m), into `out`; return it."""
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    torch.mul(x, inverse, out=out)
    return out.add_(zero).round_().clamp_(0, top).sub_(zero)


def _error(x: Tensor, h: Tensor, scale: Tensor, zero: Tensor, top: float, unit: Tensor) -> Tensor:
    """Return the weighted squared error, (m,), or () for one scale per tensor."""
    error = _units(x, scale, zero, top, unit).mul_(scale).sub_(x).square_()
    of_columns = h @ error
    return of_columns if scale.ndim else of_columns.sum()


def _least_squares(
    x: Tensor, h: Tensor, scale: Tensor, zero: Tensor, top: float, unit: Tensor
) -> Tensor:
    _units(x, scale, zero, top, unit)
    above, below = h @ (unit * x), h @ unit.square_()
    if not scale.ndim:
        above, below = above.sum(), below.sum()
    fitted = above / below.clamp(min=1e-30)
    return torch.where((below > 0) & (fitted > 0), fitted, scale)


def groups_of(columns: int, group_size: int) -> int:
    """Return how many grids a row of `columns` weights has; `group_size` < 1 is one."""
    return 1 if group_size < 1 else -(-columns // group_size)


def symmetric_zero(bits: int, *, integer: bool) -> float:
    """Return the zero of a symmetric grid: the middle of the codes, or the integer above it."""
    return float(1 << (bits - 1)) if integer else ((1 << bits) - 1) / 2
