"""Two passes over the vocabulary: the normaliser of every token, then the gradients block by block.

The forward pass goes over blocks of classes and keeps three numbers per token. The backward pass
knows every token's slope, makes a block's logits again, turns them into their gradient, and writes
the weight's gradient of these classes once, in its own dtype: four products in all, no sum over
chunks that is read and written again, and no float32 copy of the weight's size. Where one chunk of
tokens takes three products but sums the weight's gradient in float32, this is the path for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlo_core.linear.blocks import (
    finished,
    gradient,
    losses,
    needs_spread,
    new_state,
    spread,
    statistics,
)
from rlo_core.linear.chunks import sums_products_wide
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import working_dtype

ALIGNED = 16
"""Elements to which rows of a block are padded: its loads are then of 16 bytes."""


class Gradients(NamedTuple):
    """By hidden, weight and bias; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def kept_numbers(s: Settings) -> int:
    """How many numbers per token the forward pass keeps: top, log total, ce; S and the slope."""
    return 5 if s.label_smoothing > 0.0 else 3


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, s: Settings
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each block of classes: which, its weight, and its logits, all in one store."""
    tokens, classes = hidden.shape[0], weight.shape[0]
    columns = max(1, min(s.columns, classes))
    store = hidden.new_empty((tokens, -(-columns // ALIGNED) * ALIGNED), dtype=s.compute)
    for start in range(0, classes, columns):
        at = slice(start, min(start + columns, classes))
        block = weight[at].to(s.compute)
        tile = store[:, : at.stop - at.start]
        if bias is None:
            torch.mm(hidden, block.t(), out=tile)
        else:
            torch.addmm(bias[at].to(s.compute), hidden, block.t(), out=tile)
        yield at, block, tile


def _inputs(hidden: Tensor, target: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden in the compute dtype with zeros where ignored: what is there may not be finite."""
    ignored = target == s.ignore_index
    return hidden.to(s.compute).masked_fill(ignored.unsqueeze(1), 0.0), target.contiguous(), ignored


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, s: Settings
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, (N), 0 where ignored, and what `backward` needs of it.

    Args:
        hidden: (N, D).
        weight: (V, D), of this rank's classes.
        bias: (V) or None.
        target: int64, (N).
        s: Settings; `columns` says how many classes a block has.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        h, y, ignored = _inputs(hidden, target, s)
        link, work = s.decoded(), working_dtype(s.compute)
        state = new_state(len(y), h, work)
        for at, _, tile in _blocks(h, weight, bias, s):
            statistics(tile, y, state, link, s, first=s.first_class + at.start)
        rows, sums = finished(state, y, s, width=weight.shape[0]), None
        if needs_spread(link, s):
            sums = state.new_zeros((2, len(y)))
            for _, _, tile in _blocks(h, weight, bias, s):
                spread(tile, y, rows, sums, link, s)
            sums = sums if s.ranks is None else s.ranks.sum_(sums)
        found = losses(rows, sums, link, s)
        kept = [*rows[:3]]
        if s.label_smoothing > 0.0:
            kept += [found.scale, found.slope]
        return found.value.masked_fill(ignored, 0.0), torch.stack(kept)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kept: Tensor,
    s: Settings,
) -> Gradients:
    """Return the gradients of `sum(grad * loss)`, each finished and in its final dtype.

    Args:
        grad: (N), of the losses.
        hidden: As `forward`, and so the rest.
        weight: (V, D).
        bias: (V) or None.
        target: (N).
        kept: From `forward`.
        s: Settings.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        return _backward(grad, hidden, weight, bias, target, kept, s)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kept: Tensor,
    s: Settings,
) -> Gradients:
    h, y, ignored = _inputs(hidden, target, s)
    link = s.decoded()
    factor = grad.to(kept.dtype).masked_fill(ignored, 0.0)
    if s.label_smoothing == 0.0:
        factor = factor * link.slope(kept[2])
        factors = [factor.masked_fill(ignored, 0.0)]
    else:
        share = s.label_smoothing / s.classes
        factors = [kept[3] * factor, kept[4] * factor * (1.0 - s.label_smoothing), factor * share]
        factors = [x.masked_fill(ignored, 0.0) for x in factors]
    unit = None
    if s.compute == torch.float16:  # factors of 1/N would flush to zero: their largest is the unit
        unit = factors[0].abs().amax().clamp_(min=torch.finfo(kept.dtype).tiny)
        factors = [x / unit for x in factors]
    numbers = torch.cat([kept[:3], torch.stack(factors)])
    dh = dw = db = None
    if s.hidden_grad:
        dh = h.new_zeros(h.shape, dtype=kept.dtype)
    if s.weight_grad:
        dw = weight.new_empty(weight.shape, dtype=s.weight_dtype)
    if s.bias_grad:
        db = weight.new_empty(weight.shape[:1], dtype=kept.dtype)
    for at, block, tile in _blocks(h, weight, bias, s):
        gradient(tile, y, numbers, link, s, first=s.first_class + at.start)
        if dw is not None:
            _write_product(dw[at], tile.t(), h, unit)
        if db is not None:
            torch.sum(tile, 0, dtype=db.dtype, out=db[at])
        if dh is not None:
            _add_product(dh, tile, block)
    if unit is not None:
        dh = None if dh is None else dh.mul_(unit)
        db = None if db is None else db.mul_(unit)
    if dh is not None:
        dh = (dh if s.ranks is None else s.ranks.sum_(dh)).to(hidden.dtype)
    return Gradients(dh, dw, None if db is None or bias is None else db.to(bias.dtype))


def _write_product(out: Tensor, a: Tensor, b: Tensor, unit: Tensor | None) -> None:
    """Out = unit a b, rounded once to the dtype of `out`."""
    if unit is None and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
        return
    wide = torch.float32 if out.itemsize < 4 else out.dtype
    direct = unit is None and out.dtype == wide
    if sums_products_wide(a):
        if direct:
            torch.mm(a, b, out_dtype=wide, out=out)
            return
        part = torch.mm(a, b, out_dtype=wide)
    else:
        part = torch.mm(a.to(wide), b.to(wide))
    out.copy_(part if unit is None else part.mul_(unit))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a sum that is at least as wide."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif sums_products_wide(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
