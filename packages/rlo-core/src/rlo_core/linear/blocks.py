r"""Rows whose logits come in blocks of classes: what is kept of a block, and its gradient.

Pass over the blocks with `statistics`, close the account with `finished` (over the ranks of a
vocabulary-parallel group too), and every row's cross entropy is known; with logits at hand again,
`gradient` turns a block into its part of the gradient. A tile with all classes is one block.

With :math:`q = (1-e)\,onehot + e/C` a smoothed loss is :math:`\sum_c q_c\,\text{link}(ce_c)`,
and its gradient :math:`S\,p_j - q_j\,\text{link}'(ce_j)` with
:math:`S = \sum_c q_c\,\text{link}'(ce_c)`.
For links other than cross entropy the normaliser has to be known before these sums: `spread`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rlo_core.linear.link_codes import Exponential, exponential
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import capped, rows_at_a_time
from rlo_core.links import CE, Link

TOP, TOTAL, AT_TARGET, SUM = range(4)


class Rows(NamedTuple):
    """What is known of rows after all blocks, (N) each in the working precision."""

    top: Tensor
    log_total: Tensor
    """Log of the sum of exp(logit - top)."""
    ce: Tensor
    """NaN for a label that is no class."""
    sum: Tensor
    """Of the logits, where it was asked for."""


class Losses(NamedTuple):
    """Loss of each row, its slope at the target, and S; (N) each."""

    value: Tensor
    slope: Tensor
    scale: Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is there; it comes with torch on Linux."""
    return importlib.util.find_spec("triton") is not None


def uses_kernels(tile: Tensor, link: Link, s: Settings) -> bool:
    """Whether the CUDA kernels do a tile; else torch's operations do."""
    return (
        tile.device.type == "cuda"
        and tile.dtype != torch.float64
        and (s.label_smoothing == 0.0 or exponential(link) is not None)
        and has_triton()
    )


def needs_spread(link: Link, s: Settings) -> bool:
    """Whether the logits have to be passed over once more before the loss is known."""
    return s.label_smoothing > 0.0 and type(link) is not CE


def new_state(rows: int, like: Tensor, work: torch.dtype) -> Tensor:
    """Return the state of rows of which nothing is known yet, (4, N)."""
    state = like.new_zeros((4, rows), dtype=work)
    state[TOP] = -torch.inf
    return state


def _placed(target: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The column of each target in a block, (R, 1), and whether it has one."""
    column = (target - first).unsqueeze(1)
    return column.clamp(0, max(width - 1, 0)), (column >= 0) & (column < width)


def _parts(tile: Tensor) -> list[slice]:
    step = rows_at_a_time(tile)
    if tile.shape[1] == 0:  # the last rank of a small vocabulary has nothing
        return []
    return [slice(start, start + step) for start in range(0, tile.shape[0], step)]


def statistics(
    tile: Tensor, target: Tensor, state: Tensor, link: Link, s: Settings, *, first: int
) -> None:
    """Take the logits of a block into the state.

    Args:
        tile: Raw logits, (R, C).
        target: int64, (R), classes of the whole vocabulary.
        state: From `new_state`, changed in place.
        link: The loss.
        s: Settings.
        first: The class of the tile's first column.
    """
    with_sum = s.label_smoothing > 0.0 and type(link) is CE
    if uses_kernels(tile, link, s):
        from rlo_core.linear.triton_kernels import statistics_rows

        statistics_rows(
            tile,
            target,
            state,
            first=first,
            softcap=s.softcap,
            ignore_index=s.ignore_index,
            with_sum=with_sum,
        )
        return
    for at in _parts(tile):
        z = capped(tile[at], state.dtype, s.softcap)
        column, mine = _placed(target[at], first, tile.shape[1])
        top = torch.maximum(state[TOP, at], z.amax(1))
        shift = top.masked_fill(top == -torch.inf, 0.0)
        block = (z - shift.unsqueeze(1)).exp_().sum(1)
        state[TOTAL, at] = state[TOTAL, at] * (state[TOP, at] - shift).exp() + block
        state[TOP, at] = top
        found = z.gather(1, column).squeeze(1)
        state[AT_TARGET, at] = torch.where(mine.squeeze(1), found, state[AT_TARGET, at])
        if with_sum:
            state[SUM, at] += z.sum(1)


def finished(state: Tensor, target: Tensor, s: Settings, *, width: int) -> Rows:
    """Return what is known of the rows after all blocks of this rank, `width` classes, and of all.

    Two reductions over the ranks, of four numbers per row together.
    """
    top, total, at_target, added = state.unbind()
    ranks = s.ranks
    if ranks is not None:
        highest = ranks.max_(top.clone())
        mine = (target >= s.first_class) & (target < s.first_class + width)
        # Below the highest logit, so that the sum over the ranks keeps its digits.
        own = torch.where(mine, at_target - highest, 0.0)
        total, own, added = ranks.sum_(torch.stack([total * (top - highest).exp(), own, added]))
        top, at_target = highest, own + highest
    log_total = total.log()
    ce = log_total + (top - at_target)
    known = (target >= 0) & (target < s.classes)
    return Rows(top, log_total, ce.masked_fill(~known, torch.nan), added)


def spread(tile: Tensor, target: Tensor, rows: Rows, sums: Tensor, link: Link, s: Settings) -> None:
    """Add the sums of value and slope of the link over a block's logits to `sums`, (2, R)."""
    if uses_kernels(tile, link, s):
        from rlo_core.linear.triton_kernels import spread_rows

        numbers = torch.stack(rows[:2])
        form = exponential(link) or Exponential(1.0, 0.0, 0.0)
        spread_rows(
            tile, target, numbers, sums, form, softcap=s.softcap, ignore_index=s.ignore_index
        )
        return
    for at in _parts(tile):
        each = _each(capped(tile[at], sums.dtype, s.softcap), rows.top[at], rows.log_total[at])
        sums[0, at] += link.value(each).sum(1)
        sums[1, at] += link.slope(each).sum(1)


def losses(rows: Rows, sums: Tensor | None, link: Link, s: Settings) -> Losses:
    """Return value, slope and scale of rows; `sums` over all ranks, where `needs_spread`."""
    value, slope = link.value(rows.ce), link.slope(rows.ce)
    e = s.label_smoothing
    if e == 0.0:
        return Losses(value, slope, slope)
    if sums is None:  # cross entropy: the mean of all ce is the normaliser less the mean logit
        others = (rows.top + rows.log_total) - rows.sum / s.classes
        return Losses(value * (1.0 - e) + others * e, slope, torch.ones_like(value))
    share = e / s.classes
    scale = slope * (1.0 - e) + sums[1] * share
    return Losses(value * (1.0 - e) + sums[0] * share, slope, scale)


def gradient(
    tile: Tensor,
    target: Tensor,
    numbers: Tensor,
    link: Link,
    s: Settings,
    *,
    first: int,
) -> None:
    """Turn raw logits into a gradient; rows with `ignore_index` become zeros.

    Args:
        tile: (R, C), overwritten.
        target: int64, (R), contiguous.
        numbers: (3, 4 or 6, R): top, log total and ce of each row; then the factor of p - onehot;
            then, with smoothing, what is taken off at the target and the factor of link' at every
            class. The factor is 1 where it is left out.
        link: The loss, for smoothing.
        s: Settings.
        first: The class of the tile's first column.
    """
    if uses_kernels(tile, link, s):
        from rlo_core.linear.triton_kernels import gradient_rows

        gradient_rows(
            tile,
            target,
            numbers,
            exponential(link) or Exponential(1.0, 0.0, 0.0),
            first=first,
            softcap=s.softcap,
            ignore_index=s.ignore_index,
        )
        return
    column_of = numbers.unsqueeze(2)
    for at in _parts(tile):
        block, given = tile[at], column_of[:, at]
        z = capped(block, numbers.dtype, s.softcap)
        column, mine = _placed(target[at], first, tile.shape[1])
        each = given[1] + (given[0] - z)
        grad = torch.exp(-each)
        if len(numbers) > 4:
            grad.mul_(given[3]).sub_(link.slope(each) * given[5])
            grad.scatter_add_(1, column, torch.where(mine, -given[4], 0.0))
        else:
            hit = torch.where(mine, torch.expm1(-given[2]), grad.gather(1, column))
            grad.scatter_(1, column, hit)
            if len(numbers) > 3:
                grad.mul_(given[3])
        if s.softcap is not None:
            grad.mul_(1.0 - (z / s.softcap).square_())
        grad.masked_fill_((target[at] == s.ignore_index).unsqueeze(1), 0.0)
        block.copy_(grad)


def _each(z: Tensor, top: Tensor, log_total: Tensor) -> Tensor:
    """The cross entropy that each logit would have as the target's."""
    return log_total.unsqueeze(1) + (top.unsqueeze(1) - z)
