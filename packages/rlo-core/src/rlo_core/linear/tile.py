"""A tile of logits to per-row loss, row scale and gradient tile; the part that a link changes.

The gradient of a row's loss by its logits is `scale * G`: `scale` is `link'(ce)`, one number per
row, and `G = softmax - onehot` overwrites the logits. The two stay apart, because folding a scale
of slope/N into the tile would flush 97 % of it to zero in float16.

The tile is worked on a few rows at a time, in one scratch of the working precision: the block stays
in the cache over all the passes, and a half-precision tile never has a float32 copy.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rlo_core.links import Link

BLOCK_ELEMENTS = 1 << 17
"""Logits per block and thread: 512 KiB of float32, half of an L2 cache."""


class Collective(Protocol):
    """The two reductions over the ranks of a vocabulary-parallel group, in place."""

    def max_(self, x: Tensor) -> Tensor:
        """Return the largest over the ranks."""
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        ...


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _block_rows(tile: Tensor) -> int:
    if tile.device.type != "cpu":
        return max(tile.shape[0], 1)  # a launch per block costs more than the cache gives
    elements = BLOCK_ELEMENTS * torch.get_num_threads()
    return max(1, min(tile.shape[0], elements // max(tile.shape[1], 1)))


def _capped(
    block: Tensor, work: torch.dtype, softcap: float | None, scratch: Tensor | None = None
) -> Tensor:
    """The logits of a block in the working precision; the block itself when nothing changes it."""
    if block.dtype == work:
        z = block
    elif scratch is None:
        z = block.to(work)
    else:
        z = scratch[: block.shape[0]].copy_(block)
    if softcap is None:
        return z
    return (z / softcap).tanh_().mul_(softcap)


def rows_loss(
    tile: Tensor,
    target: Tensor,
    link: Link,
    *,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the row scale of hard targets; turn the tile into G.

    Args:
        tile: Raw logits, (R, V), any floating dtype; overwritten.
        target: int64, (R), in [0, V).
        link: The map from cross entropy to loss.
        softcap: Logits are `softcap * tanh(logits / softcap)`; None for as they are.
        with_gradient: False leaves the tile undefined.

    Returns:
        Loss and scale, each (R) in the working precision.
    """
    work = working_dtype(tile.dtype)
    ce = torch.empty(tile.shape[0], dtype=work, device=tile.device)
    step = _block_rows(tile)
    in_place = tile.device.type == "cpu"  # its kernel reads a row before it writes it
    scratch = None
    if work != tile.dtype:
        scratch = tile.new_empty((min(step, tile.shape[0]), tile.shape[1]), dtype=work)
    for start in range(0, tile.shape[0], step):
        block = tile[start : start + step]
        y = target[start : start + step].unsqueeze(1)
        z = _capped(block, work, softcap, scratch)
        # d capped / d raw = 1 - tanh^2, taken before softmax overwrites z
        bend = None
        if softcap is not None and with_gradient:
            bend = (z / softcap).square_().neg_().add_(1.0)
        top = z.amax(1, keepdim=True)
        at_target = z.gather(1, y)
        # torch's softmax is twice as fast as its exp alone. The largest p is 1/sum(exp(z - top)).
        z = torch.softmax(z, -1, out=z) if in_place else torch.softmax(z, -1)
        # Not lse - z_y: near p = 1 that would cancel all but the digits of the largest logit.
        block_ce = (top - at_target) - z.amax(1, keepdim=True).log_()
        ce[start : start + step] = block_ce.squeeze(1)
        if not with_gradient:
            continue
        z.scatter_(1, y, torch.expm1(-block_ce))  # p - 1, exact where p - 1 would round
        if bend is not None:
            z.mul_(bend)
        if z is not block:
            block.copy_(z)
    return link.value(ce), link.slope(ce)


def rows_loss_spread(
    tile: Tensor,
    target: Tensor,
    link: Link,
    *,
    softcap: float | None,
    smoothing: float,
    first_class: int,
    classes: int,
    ranks: Collective | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    r"""Return what `rows_loss` returns, for smoothed targets and for a shard of the vocabulary.

    With :math:`q = (1-e)\,onehot + e/C` the loss is :math:`\sum_c q_c\,\text{link}(ce_c)`, and its
    gradient :math:`S\,(p_j - q_j\,\text{link}'(ce_j)/S)` with the scale
    :math:`S = \sum_c q_c\,\text{link}'(ce_c)`. The normaliser has to be known before any of
    them, so the logits are passed over more than once.

    Args:
        tile: Raw logits of this rank's classes, (R, V_local); overwritten.
        target: int64, (R), in [0, classes), the same on every rank.
        link: The map from cross entropy to loss.
        softcap: As `rows_loss`.
        smoothing: e in [0, 1].
        first_class: The class of the tile's first column.
        classes: C, over all ranks.
        ranks: The reductions over the ranks; None where the tile has all classes.
        with_gradient: As `rows_loss`.
    """
    work = working_dtype(tile.dtype)
    rows, width = tile.shape
    new = tile.new_empty
    top = new((rows, 1), dtype=work)
    total, at_target = torch.empty_like(top), torch.empty_like(top)
    column = (target - first_class).unsqueeze(1)
    mine = (column >= 0) & (column < width)
    column = column.clamp(0, max(width - 1, 0))
    step = _block_rows(tile)
    blocks = [slice(start, start + step) for start in range(0, rows, step)]
    if width == 0:  # the last rank of a small vocabulary: it has nothing, and has to say so
        top.fill_(-torch.inf)
        total.zero_()
        at_target.zero_()
        blocks = []
    for at in blocks:
        z = _capped(tile[at], work, softcap)
        top[at] = z.amax(1, keepdim=True)
        total[at] = (z - top[at]).exp_().sum(1, keepdim=True)
        at_target[at] = z.gather(1, column[at])
    if ranks is not None:
        highest = ranks.max_(top.clone())
        total = ranks.sum_(total * (top - highest).exp_())
        top = highest
        at_target = ranks.sum_(torch.where(mine, at_target - top, 0.0)) + top
    log_total = total.log_()
    ce = log_total + (top - at_target)
    value, slope = link.value(ce), link.slope(ce)
    if smoothing > 0.0:
        sums = torch.zeros((rows, 2), dtype=work, device=tile.device)
        for at in blocks:
            each = log_total[at] + (top[at] - _capped(tile[at], work, softcap))
            sums[at, 0] = link.value(each).sum(1)
            sums[at, 1] = link.slope(each).sum(1)
        if ranks is not None:
            sums = ranks.sum_(sums)
        spread = smoothing / classes
        value = value * (1.0 - smoothing) + sums[:, :1] * spread
        scale = slope * (1.0 - smoothing) + sums[:, 1:] * spread
    else:
        scale = slope
    if with_gradient:
        safe = scale.clamp(min=torch.finfo(work).tiny)  # all slopes can underflow together
        for at in blocks:
            block = tile[at]
            z = _capped(block, work, softcap)
            each = log_total[at] + (top[at] - z)
            grad = torch.exp(-each)
            if smoothing > 0.0:
                grad.sub_(link.slope(each) * (spread / safe[at]))
                off = (1.0 - smoothing) * (slope[at] / safe[at])
                grad.scatter_add_(1, column[at], torch.where(mine[at], -off, 0.0))
            else:
                hit = torch.where(mine[at], torch.expm1(-ce[at]), grad.gather(1, column[at]))
                grad.scatter_(1, column[at], hit)
            if softcap is not None:
                grad.mul_(1.0 - (z / softcap).square_())
            block.copy_(grad)
    return value.squeeze(1), scale.squeeze(1)
