r"""Fitting the scales of a GGUF block type to weights: first a sub-block's, then the block's.

The error is :math:`\sum_j h_j (x_j - Q(x_j))^2`, h the importance of a column. Each sub-block
first gets a scale (and an offset) in full precision, by trying widths and least squares; then d is
chosen so that the largest becomes the largest integer; then d, d_min and the integers are improved
in turn, each by least squares with the codes held, wherever that lowers the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.formats.gguf.grids import BlockGrid, half_steps, level_tables
from rlo_gptq.formats.gguf.types import BlockType

_TINY = 1e-30
# Widths that are tried, as shares of the full range: fewer for grids that are fitted once more.
_WIDTHS = {False: (1.0, 0.92, 0.84, 0.74), True: (1.05, 1.0, 0.96, 0.92, 0.88, 0.84, 0.78, 0.7)}
_ROUNDS = {False: 1, True: 3}
# Weights that are fitted at one time: a core's own cache holds them and their temporaries.
_FITTED = 1 << 16


def half(x: Tensor) -> Tensor:
    """Return x rounded to half precision, within its range."""
    return x.clamp(-65504, 65504).to(torch.float16).to(x.dtype)


def fit_blocks(
    x: Tensor, importance: Tensor, kind: BlockType, *, thorough: bool = True
) -> BlockGrid:
    """Return the grid of a block type for weights.

    Args:
        x: Weights (d, m), transposed; d a multiple of the block's columns.
        importance: h, (d,), at least 0.
        kind: Of the blocks.
        thorough: Try all widths; False is for a grid that will be fitted again.
    """
    d, m = x.shape
    blocks, subs = d // kind.columns, kind.columns // kind.group
    found = [torch.empty(blocks * n, m, dtype=x.dtype, device=x.device) for n in (1, subs, 1, subs)]
    # A block's columns and some outputs at a time.
    step = max(16, _FITTED // kind.columns)
    for block in range(blocks):
        columns = slice(block * kind.columns, (block + 1) * kind.columns)
        h = importance[columns].reshape(subs, kind.group, 1)
        h = h / h.mean().clamp(min=_TINY)
        for begin in range(0, m, step):
            part = slice(begin, min(begin + step, m))
            piece = x[columns, part].reshape(subs, kind.group, -1)
            fitted = _Block(kind, piece, h).fit(thorough=thorough)
            for whole, value in zip(found, fitted, strict=True):
                n = len(value)
                whole[block * n : (block + 1) * n, part] = value
    return BlockGrid(kind, *found)


@dataclass
class _Block:
    """One block of some outputs: x (sub-blocks, group, m), h (sub-blocks, group, 1)."""

    kind: BlockType
    x: Tensor
    h: Tensor

    def __post_init__(self) -> None:
        levels, nearest = level_tables(self.kind, self.x)
        self.nearest = levels[nearest] if self.kind.levels else levels
        self.hx = self.h * self.x

    def units(self, step: Tensor, floor: Tensor | None) -> Tensor:
        """Return u of the nearest codes, (sub-blocks, group, m); step and floor (sub-blocks, m)."""
        inverse = torch.where(step != 0, 1 / step, torch.zeros_like(step))[:, None]
        if self.kind.levels:
            return self.nearest[half_steps(self.x * inverse)]
        zero = self.kind.zero
        at = self.x * inverse if floor is None else (self.x + floor[:, None]).mul_(inverse)
        return at.add_(zero).round_().clamp_(0, self.kind.top).sub_(zero)

    def error(self, step: Tensor, floor: Tensor | None) -> Tensor:
        """Return the weighted squared error of each sub-block, (sub-blocks, m)."""
        return self.error_of(self.units(step, floor), step, floor)

    def error_of(self, unit: Tensor, step: Tensor, floor: Tensor | None) -> Tensor:
        value = unit * step[:, None]
        if floor is not None:
            value.sub_(floor[:, None])
        return value.sub_(self.x).square_().mul_(self.h).sum(1)

    def line(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least-squares step and floor of x = step u - floor, floor at least 0 where the
        type stores it unsigned.
        """
        hu = self.h * unit
        su, suu, sxu = hu.sum(1), (hu * unit).sum(1), (hu * self.x).sum(1)
        through = sxu / suu.clamp(min=_TINY)
        if not self.kind.mins:
            return through, torch.zeros_like(through)
        s, sx = self.h.sum(1), self.hx.sum(1)
        det = s * suu - su.square()
        step = torch.where(det > 1e-6 * s * suu, (s * sxu - su * sx) / det.clamp(min=_TINY), 0.0)
        floor = (step * su - sx) / s.clamp(min=_TINY)
        if self.kind.two_level:
            below = floor < 0
            floor = floor.clamp(min=0)
            step = torch.where(below, through, step)
            step = step.clamp(min=0)
        return step, floor

    def fit(self, *, thorough: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return d (1, m), subs (sub-blocks, m), d_min (1, m) and mins (sub-blocks, m)."""
        step, floor = self._each(_WIDTHS[thorough])
        kind = self.kind
        low, high = kind.subs
        if kind.two_level:
            best: tuple[Tensor, ...] | None = None
            for stretch in (1.0, 0.95, 1.05) if thorough else (1.0,):
                d = half(step.abs().amax(0, keepdim=True) / high * stretch)
                sub = _integers(step, d, low, high)
                dmin = half(floor.amax(0, keepdim=True) / max(kind.mins, 1))
                mins = _integers(floor, dmin, 0, kind.mins)
                state = (d, sub, dmin, mins)
                best = state if best is None else self._better(best, state)
            assert best is not None
            fitted = best
        else:
            sub = torch.where(step < 0, -1.0, 1.0) if low < 0 else torch.ones_like(step)
            fitted = (half(step.abs()), sub, half(floor), torch.full_like(step, float(kind.mins)))
        d, sub, dmin, mins = fitted
        for _ in range(_ROUNDS[thorough]):
            d, sub, dmin, mins = self._improve(d, sub, dmin, mins)
        return d, sub, dmin, mins

    def _each(self, widths: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Return the best step and floor of each sub-block by itself, in full precision."""
        x, kind = self.x, self.kind
        candidates: list[tuple[Tensor, Tensor | None]] = []
        if kind.mins:
            low, high = x.amin(1), x.amax(1)
            if kind.two_level:
                low = low.clamp(max=0)
            for width in widths:
                centre, reach = (low + high) / 2, (high - low) / 2 * width
                floor = reach - centre
                if kind.two_level:
                    floor = floor.clamp(min=0)
                candidates.append((2 * reach / kind.top, floor))
        else:
            widest = x.abs().amax(1)
            units = kind.levels or (-kind.zero, kind.top - kind.zero)
            far = float(max(map(abs, units)))
            near = float(min(abs(units[0]), abs(units[-1])))
            signs = (1.0, -1.0) if kind.subs[0] < 0 else (1.0,)
            # Codes reach farther on one side: the sign says to which side of zero that goes.
            for width in widths:
                for sign in signs:
                    candidates.append((sign * width * widest / far, None))
            candidates.append((widest / near, None))
        best_step = torch.zeros_like(x[:, 0])
        best_floor = torch.zeros_like(best_step)
        best_error = self.error(best_step, best_floor if kind.mins else None)
        for step, offset in candidates:
            unit = self.units(step, offset)
            sloped, under = self.line(unit)
            tries: tuple[tuple[Tensor, Tensor | None], ...] = (
                (step, offset),
                (sloped, under if kind.mins else None),
            )
            for a, b in tries:
                error = self.error(a, b) if a is not step else self.error_of(unit, a, b)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_step = torch.where(better, a, best_step)
                if b is not None:
                    best_floor = torch.where(better, b, best_floor)
        return best_step, best_floor

    def _total(self, state: tuple[Tensor, ...]) -> Tensor:
        """Return the error of the block, (m,)."""
        step, floor = self._products(state)
        return self.error(step, floor).sum(0)

    def _products(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        d, sub, dmin, mins = state
        return d * sub, dmin * mins if self.kind.mins else None

    def _better(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return for each output the state with the smaller error."""
        better = self._total(new) < self._total(old)
        return tuple(torch.where(better, b, a) for a, b in zip(old, new, strict=True))

    def _improve(self, *state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refit d and d_min with the integers held, then the integers with d and d_min held."""
        kind = self.kind
        d, sub, dmin, mins = state
        step, floor = self._products(state)
        unit = self.units(step, floor)
        new = self._better(state, self._super(unit, d, sub, dmin, mins))
        if kind.two_level:
            d, sub, dmin, mins = new
            step, floor = self._products(new)
            unit = self.units(step, floor)
            error = self.error_of(unit, step, floor)
            wanted, under = self.line(unit)
            low, high = kind.subs
            tried = _integers(wanted, d, low, high)
            choices = [(tried, mins), (tried, _integers(under, dmin, 0, kind.mins))]
            choices += [(sub + 1, mins), (sub - 1, mins)]
            if kind.mins:
                choices += [(sub, mins + 1), (sub, mins - 1)]
            for s, n in choices if kind.mins else choices[:1] + choices[2:]:
                s, n = s.clamp(low, high), n.clamp(0, kind.mins)
                attempt = self.error(d * s, dmin * n if kind.mins else None)
                better = attempt < error
                error = torch.where(better, attempt, error)
                sub, mins = torch.where(better, s, sub), torch.where(better, n, mins)
            new = (d, sub, dmin, mins)
        d, sub, dmin, mins = new
        return d, sub, dmin, mins

    def _super(
        self, unit: Tensor, d: Tensor, sub: Tensor, dmin: Tensor, mins: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the state with the least-squares d and d_min of the codes given."""
        u = (unit * sub[:, None]).flatten(0, 1)
        h, x = self.h.flatten(0, 1), self.x.flatten(0, 1)
        hu = h * u
        suu, sxu = (hu * u).sum(0, True), (hu * x).sum(0, True)
        if not self.kind.mins:
            new = half(sxu / suu.clamp(min=_TINY))
            return torch.where((suu > 0) & (new > 0), new, d), sub, dmin, mins
        v = -mins[:, None].expand_as(self.x).flatten(0, 1)
        hv = h * v
        svv, suv, sxv = (hv * v).sum(0, True), (hu * v).sum(0, True), (hv * x).sum(0, True)
        det = suu * svv - suv.square()
        sound = det > 1e-6 * suu * svv
        safe = det.clamp(min=_TINY)
        new_d = torch.where(sound, (svv * sxu - suv * sxv) / safe, sxu / suu.clamp(min=_TINY))
        new_min = torch.where(sound, (suu * sxv - suv * sxu) / safe, dmin)
        new_d, new_min = half(new_d), half(new_min)
        signed = not self.kind.two_level
        good = (suu > 0) & (new_d > 0) & (signed | (new_min >= 0))
        return torch.where(good, new_d, d), sub, torch.where(good, new_min, dmin), mins


def _integers(x: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """Return the nearest multiples of `unit` (1, m), as integers from low to high."""
    inverse = torch.where(unit > 0, 1 / unit, torch.zeros_like(unit))
    return (x * inverse).round_().clamp_(low, high)
