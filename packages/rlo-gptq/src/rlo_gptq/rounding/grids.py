r"""Grids of representable values, one (scale, zero) per row, group or matrix.

Inside the rounding code everything is transposed, (d, m): one column of W is then one contiguous
row of memory, which is what an algorithm that visits columns one by one reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlo_gptq.settings import LayerSettings, ScaleDtype

# Half-widths of the search, in units of the root mean square of a row (or group): Gaussian rows
# want 1.5 at 2 bits to 2.9 at 4, and rows with outliers up to their absolute maximum.
_NARROWEST = 0.7
# Widths that are tried. The error is ragged over widths: eight, and finer steps around the best of
# them, lose 3 % of the loss at 4 bits; half as many in a first fit lose the grid of weights that
# are on one already.
_CANDIDATES = 24
# Weights that are fitted at one time. A core's own cache holds those of a CPU, and the search reads
# them a hundred times; a GPU takes all groups in one go, as long as there is room.
_FITTED = {"cpu": 1 << 17, "cuda": 1 << 27}


ALL = slice(None)


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
        """Return what a scale multiplies, (n, m), of the codes (n, m) of some columns, (n,)."""

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return the values (n, m) of the codes (n, m) of some columns, (n,)."""

    def join(self, others: Sequence[Any]) -> Grid:
        """Return the grid of this one's outputs and those of other grids of its kind."""


def column_groups(d: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Return the group of each column, int64 (d,); -1 and 0 mean one group."""
    if group_size <= 0:
        return torch.zeros(d, dtype=torch.int64, device=device)
    return torch.arange(d, device=device) // group_size


def group_runs(d: int, group_size: int) -> list[tuple[int, int, int]]:
    """Return (first group, group after the last, columns of each): a short last group is alone."""
    size = group_size if group_size > 0 else d
    whole = d // size
    runs = [(0, whole, size), (whole, whole + 1, d % size)]
    return [run for run in runs if run[0] < run[1] and run[2]]


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
    _of: list[int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.top = float(2**self.bits - 1)
        self.set_scales(self.scales)

    def set_scales(self, scales: Tensor) -> None:
        """Replace the scales, (groups, m)."""
        self.scales = scales
        self.inverse = inverse_of(scales)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes and values of column j, all (m,)."""
        if not self._rows:
            # Lists of rows: indexing a tensor costs more than the arithmetic on 1000 elements.
            self._rows = list(zip(self.inverse, self.zeros, self.scales, strict=True))
        if self._of is None:
            self._of = self.group.tolist()
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
        columns = torch.arange(len(x), device=x.device)
        inverse = self._of_columns(self.inverse, columns)
        zero = self._of_columns(self.zeros, columns)
        return torch.addcmul(zero, x, inverse).round_().clamp_(0, self.top)

    def units(self, codes: Tensor, columns: Tensor, part: slice = ALL) -> Tensor:
        """Return code - zero, (n, some), of some columns, (n,), and of the outputs in a slice."""
        return codes - self._of_columns(self.zeros, columns)[:, part]

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return scale * (code - zero), (n, m)."""
        return self.units(codes, columns).mul_(self._of_columns(self.scales, columns))

    def _of_columns(self, table: Tensor, columns: Tensor) -> Tensor:
        """Return the rows (n, m) of a table (groups, m), or the one row that there is."""
        return table if len(table) == 1 else table[self.group[columns]]

    def join(self, others: Sequence[ScalarGrid]) -> ScalarGrid:
        """Return the grid of the outputs of all, along m."""
        grids = (self, *others)
        scales = torch.cat([grid.scales for grid in grids], 1)
        zeros = torch.cat([grid.zeros for grid in grids], 1)
        return ScalarGrid(scales, zeros, self.bits, self.group)


def nearest_stored(x: Tensor, dtype: ScaleDtype) -> Tensor:
    """Return x rounded to the type in which it is stored, in its own type; inf where it is out."""
    return x.to(getattr(torch, dtype)).to(x.dtype)


def stored(x: Tensor, dtype: ScaleDtype) -> Tensor:
    """Return `nearest_stored`, checked; the check waits for the device.

    Raises:
        ValueError: a value leaves the range of `dtype`.
    """
    kept = nearest_stored(x, dtype)
    if not torch.isfinite(kept).all():
        raise out_of_range(x.abs().max().item(), dtype)
    return kept


def out_of_range(largest: float, dtype: ScaleDtype) -> ValueError:
    """Return the error of scales that their type cannot hold."""
    return ValueError(f"scales must fit {dtype}, got {largest:.3g}; use scale_dtype='float32'")


def fit_grid(x: Tensor, importance: Tensor, settings: LayerSettings) -> ScalarGrid:
    r"""Return the grid that minimises :math:`\sum_j h_j (x_j - Q(x_j))^2` in every row and group.

    Widths from narrow to the absolute maximum are tried, then the best is refined by two steps of
    least squares; for an asymmetric grid the range keeps its own centre. Nothing here waits for
    the device.

    Args:
        x: weights (d, m), transposed.
        importance: h, (d,), at least 0.
        settings: bits, grid kind and the type of scales.

    Returns:
        A grid whose scales and zeros are already rounded to `settings.scale_dtype`; a scale is inf
        where that type cannot hold the narrowest width, see `check_scales`.
    """
    d, m = x.shape
    size = settings.group_size if settings.group_size > 0 else d
    groups = -(-d // size)
    scales = torch.empty(groups, m, dtype=x.dtype, device=x.device)
    zeros = torch.empty_like(scales)
    most = _FITTED.get(x.device.type, _FITTED["cpu"])
    for first, last, width in group_runs(d, size):
        # One scale for the matrix has to see all of it; else as much as there is room for.
        outputs = m if settings.group_size == 0 else min(m, max(16, most // width))
        step = max(1, most // (width * outputs))
        for g in range(first, last, step):
            end = min(g + step, last)
            columns = slice(g * size, g * size + (end - g) * width)
            h = importance[columns].view(end - g, width)
            for begin in range(0, m, outputs):
                part = slice(begin, min(begin + outputs, m))
                block = x[columns, part].reshape(end - g, width, -1)
                scales[g:end, part], zeros[g:end, part] = _fit_groups(block, h, settings)
    return ScalarGrid(scales, zeros, settings.bits, column_groups(d, size, x.device))


def check_scales(grid: Grid, x: Tensor, settings: LayerSettings) -> None:
    """Refuse a grid with a scale that its type cannot hold; waits for the device.

    Args:
        grid: made by `fit_grid`.
        x: weights (d, m).
        settings: those of the grid.

    Raises:
        ValueError: a scale is not finite; names the scale that is wanted.
    """
    if not torch.isfinite(grid.scales).all():
        widened = replace(settings, scale_dtype="float32")
        wanted = fit_grid(x, torch.ones_like(x[:, 0]), widened)
        raise out_of_range(wanted.scales.max().item(), settings.scale_dtype)


def _fit_groups(x: Tensor, h: Tensor, settings: LayerSettings) -> tuple[Tensor, Tensor]:
    """Search groups of columns, x (n, size, m) and h (n, size); return scale and zero, (n, m).

    Of one scale for the matrix they are (1, 1).
    """
    top = float(2**settings.bits - 1)
    axes = (1, 2) if settings.group_size == 0 else (1,)
    low, high = (f(axes) for f in (x.amin, x.amax))
    rms = x.square().mean(axes).sqrt()
    if settings.group_size == 0:
        low, high, rms = low[:, None], high[:, None], rms[:, None]
    if settings.sym:
        widest = torch.maximum(high, -low)
        centre = torch.zeros_like(widest)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        centre, widest = (low + high) / 2, (high - low) / 2
    narrowest = torch.minimum(_NARROWEST * rms, widest)
    # All widths at once, (tries, n, m), so that only what needs the weights is done for each.
    share = torch.linspace(0, 1, _CANDIDATES, dtype=x.dtype, device=x.device)[:, None, None]
    half = narrowest * (widest / narrowest.clamp(min=1e-30)) ** share
    scales = nearest_stored(half * (2 / top), settings.scale_dtype)
    zeros = _zero_of(centre, scales * (top / 2), settings)
    search = _Search(x, h, settings)
    errors = search.errors(scales, zeros)
    best = errors.argmin(0, keepdim=True)
    scale, zero = scales.gather(0, best)[0], zeros.gather(0, best)[0]
    error = errors.gather(0, best)
    for _ in range(2):
        fitted = nearest_stored(search.least_squares(scale, zero), settings.scale_dtype)
        new_error = search.errors(fitted[None], zero[None])
        better = new_error < error
        scale = torch.where(better[0], fitted, scale)
        error = torch.minimum(new_error, error)
    return scale, zero


class _Search:
    """What a search reads, x (n, size, m) and h (n, size), and the buffers of a try."""

    def __init__(self, x: Tensor, h: Tensor, settings: LayerSettings) -> None:
        self.x, self.h, self.per_tensor = x, h[:, None], settings.group_size == 0
        self.top = float(2**settings.bits - 1)
        self._unit, self._code = torch.empty_like(x), torch.empty_like(x)

    def errors(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return the weighted squared errors of grids, each (tries, n, m); inf where there is none.

        In units of the scale until the end; where that is 0 every value is 0.
        """
        inverses = inverse_of(scales)
        sums = [
            self._weighted(self._codes(inverse, zero).sub_(self._unit).square_())
            for inverse, zero in zip(inverses, zeros, strict=True)
        ]
        errors = torch.stack(sums).mul_(scales.square())
        # One that is not finite may not be chosen; a scale of 0 loses all of the weight.
        whole = self._weighted(torch.square(self.x, out=self._unit))
        return torch.where(scales > 0, errors, whole).nan_to_num_(nan=torch.inf)

    def least_squares(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the scale that is best for the codes of a grid (n, m)."""
        unit = self._codes(inverse_of(scale), zero).sub_(zero[:, None])
        above = self._weighted(torch.mul(unit, self.x, out=self._unit))
        below = self._weighted(unit.square_())
        fitted = above / below.clamp(min=1e-30)
        return torch.where((below > 0) & (fitted > 0), fitted, scale)

    def _codes(self, inverse: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes; leaves x / scale + zero in `_unit`."""
        torch.addcmul(zero[:, None], self.x, inverse[:, None], out=self._unit)
        return torch.round(self._unit, out=self._code).clamp_(0, self.top)

    def _weighted(self, of: Tensor) -> Tensor:
        """Return the sums weighted by importance, (n, m), or (n, 1) of one scale for the matrix."""
        sums = torch.bmm(self.h, of)[:, 0]
        return sums.sum(1, keepdim=True) if self.per_tensor else sums


def inverse_of(scale: Tensor) -> Tensor:
    """Return 1 / scale, 0 where that is not finite."""
    return scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _zero_of(centre: Tensor, half: Tensor, settings: LayerSettings) -> Tensor:
    top = float(2**settings.bits - 1)
    if settings.sym:
        return torch.full_like(half, (top + 1) / 2 if settings.integer_zero else top / 2)
    scale = 2 * half / top
    zero = torch.where(scale > 0, top / 2 - centre / scale, torch.full_like(half, top / 2))
    if settings.integer_zero:
        return zero.round().clamp(0, top)
    return stored(zero, settings.scale_dtype)


def groups_of(columns: int, group_size: int) -> int:
    """Return how many grids a row of `columns` weights has; `group_size` < 1 is one."""
    return 1 if group_size < 1 else -(-columns // group_size)


def symmetric_zero(bits: int, *, integer: bool) -> float:
    """Return the zero of a symmetric grid: the middle of the codes, or the integer above it."""
    return float(1 << (bits - 1)) if integer else ((1 << bits) - 1) / 2
