"""The loop over chunks of tokens: three matrix products each, and only one chunk's logits.

The scale of a row, `link'(ce)`, is known as soon as its ce is; so the gradients are finished while
the chunk's logits are still there, and no chunk is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    uses_kernels,
)
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import rows_loss, working_dtype
from rlo_core.links import Link

VOCABULARY_BLOCK = 8192
"""Classes whose share of a half-precision weight gradient is formed before it joins the float32
sum: the block is then still in the cache (90 ms a chunk, 115 for all of 32000 at once)."""


@dataclass
class Sums:
    """The losses and the gradients of their weighted sum, before any factor from outside."""

    loss: Tensor
    """(N), 0 where ignored."""
    scale: Tensor
    """(N), what each row of `hidden_grad` has yet to be multiplied by."""
    hidden_grad: Tensor | None
    """(N, D) in the compute dtype; in half precision the scale could flush it to zero."""
    weight_grad: Tensor | None
    """(V, D), float32 or wider."""
    bias_grad: Tensor | None
    """(V), float32 or wider."""


def chunk_size(tokens: int, rows: int) -> int:
    """Return the rows per chunk that spread `tokens` evenly over chunks of at most `rows`."""
    chunks = max(1, -(-tokens // max(rows, 1)))
    return max(1, -(-tokens // chunks))


def sums_products_wide(x: Tensor) -> bool:
    """Whether half-precision products can be added to a float32 sum without a copy (CUDA)."""
    return x.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out")


def drops_ignored(device: torch.device) -> bool:
    """Whether ignored rows are taken out; elsewhere counting them would wait for the device."""
    return device.type == "cpu"


def run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    s: Settings,
    observer: Callable[[Tensor, Tensor, Any], Tensor | None] | None = None,
) -> Sums:
    """Return per-token losses and the gradients of `sum(factor * loss)`.

    Args:
        hidden: (N, D).
        weight: (V, D), of this rank's classes.
        bias: (V) or None.
        target: int64, (N).
        factor: (N), the weight of each token in the sum; None for ones.
        s: The rest.
        observer: Called with the logits of each chunk, their targets and which rows they are,
            before the gradient overwrites them; returns a factor for each of these rows, or None.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        return _run(hidden, weight, bias, target, factor, s, observer)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    s: Settings,
    observer: Callable[[Tensor, Tensor, Any], Tensor | None] | None,
) -> Sums:
    tokens, width = hidden.shape
    work = working_dtype(s.compute)
    weight = weight.to(s.compute)
    bias = None if bias is None else bias.to(s.compute)
    ignored = kept = None
    if not drops_ignored(target.device):
        ignored = target == s.ignore_index
    else:
        counted = target != s.ignore_index
        kept = None if bool(counted.all()) else counted.nonzero().squeeze(1)
    count = tokens if kept is None else kept.numel()
    link, ranks = s.decoded(), s.ranks
    loss = hidden.new_zeros(tokens, dtype=work)
    sums = Sums(loss, torch.zeros_like(loss), None, None, None)
    if s.hidden_grad:
        make = hidden.new_empty if kept is None else hidden.new_zeros
        sums.hidden_grad = make((tokens, width), dtype=s.compute)
    if s.weight_grad:  # the first chunk fills it
        make = hidden.new_empty if count else hidden.new_zeros
        sums.weight_grad = make(weight.shape, dtype=work)
    if s.bias_grad:
        sums.bias_grad = weight.new_zeros(weight.shape[0], dtype=work)
    step = chunk_size(count, s.rows)
    store = hidden.new_empty((min(step, count), weight.shape[0]), dtype=s.compute)
    for start in range(0, count, step):
        at: slice | Tensor = slice(start, min(start + step, count))
        if kept is not None:
            at = kept[at]
        h, y = hidden[at].to(s.compute), target[at]
        tile = store[: h.shape[0]]
        if bias is None:
            torch.mm(h, weight.t(), out=tile)
        else:
            torch.addmm(bias, h, weight.t(), out=tile)
        skip = None if ignored is None else ignored[at]
        gate = None if observer is None else observer(tile, y, at)
        value, slope = _rows(tile, y, skip, link, s)
        if gate is not None:
            value, slope = value * gate, slope * gate
        scale = slope if factor is None else slope * factor[at]
        if skip is not None:  # where, not times: what is in an ignored row may not be finite
            value, scale = value.masked_fill(skip, 0.0), scale.masked_fill(skip, 0.0)
            h = h.masked_fill(skip.unsqueeze(1), 0.0)
        sums.loss[at], sums.scale[at] = value, scale
        if s.any_grad:
            _accumulate(sums, at, tile, h, weight, scale, first=start == 0)
    if ranks is not None and sums.hidden_grad is not None:
        sums.hidden_grad = ranks.sum_(sums.hidden_grad)
    return sums


def _rows(
    tile: Tensor, target: Tensor, skip: Tensor | None, link: Link, s: Settings
) -> tuple[Tensor, Tensor]:
    """Loss and scale of a tile, which becomes its gradient; rows to skip become zero."""
    if s.label_smoothing == 0.0 and not s.group and not uses_kernels(tile, link, s):
        safe = target if skip is None else target.masked_fill(skip, 0)
        found = rows_loss(tile, safe, link, softcap=s.softcap, with_gradient=s.any_grad)
        if skip is not None and s.any_grad:
            tile.masked_fill_(skip.unsqueeze(1), 0.0)
        return found
    target = target.contiguous()
    work, first = working_dtype(tile.dtype), s.first_class
    state = new_state(len(target), tile, work)
    statistics(tile, target, state, link, s, first=first)
    rows, sums = finished(state, target, s, width=tile.shape[1]), None
    if needs_spread(link, s):
        sums = state.new_zeros((2, len(target)))
        spread(tile, target, rows, sums, link, s)
        sums = sums if s.ranks is None else s.ranks.sum_(sums)
    value, slope, scale = losses(rows, sums, link, s)
    if s.any_grad:
        numbers = [*rows[:3]]
        if s.label_smoothing > 0.0:
            safe = scale.clamp(min=torch.finfo(work).tiny)  # all slopes can underflow together
            share = s.label_smoothing / s.classes
            off = slope / safe * (1.0 - s.label_smoothing)
            numbers += [torch.ones_like(scale), off, share / safe]
        gradient(tile, target, torch.stack(numbers), link, s, first=first)
    return value, scale


def _accumulate(
    sums: Sums,
    at: slice | Tensor,
    tile: Tensor,
    h: Tensor,
    weight: Tensor,
    s: Tensor,
    *,
    first: bool,
) -> None:
    """Add one chunk: dh = G W (its scale comes later), dW += G^T (s h), db += G^T s."""
    if sums.hidden_grad is not None:
        if isinstance(at, slice):
            torch.mm(tile, weight, out=sums.hidden_grad[at])
        else:
            sums.hidden_grad[at] = torch.mm(tile, weight)
    if tile.dtype == s.dtype:
        if sums.weight_grad is not None:
            sums.weight_grad.addmm_(tile.t(), h * s.unsqueeze(1), beta=0 if first else 1)
        if sums.bias_grad is not None:
            sums.bias_grad.addmv_(tile.t(), s)
        return
    # float16: scales above its range (a convex link) or below it stay in float32, as one unit for
    # all rows of the chunk. bfloat16 has the range of float32.
    unit = None
    if tile.dtype == torch.float16:
        unit = s.abs().amax().clamp_(min=torch.finfo(s.dtype).tiny)
        s = s / unit
    if sums.bias_grad is not None:
        part = torch.mv(tile.t(), s.to(tile.dtype)).to(s.dtype)
        sums.bias_grad.add_(part if unit is None else part * unit)
    if sums.weight_grad is None:
        return
    scaled = (h * s.unsqueeze(1)).to(tile.dtype)
    if unit is None and sums_products_wide(tile):
        if first:
            torch.mm(tile.t(), scaled, out_dtype=s.dtype, out=sums.weight_grad)
        else:
            total = sums.weight_grad
            torch.addmm(total, tile.t(), scaled, out_dtype=s.dtype, out=total)
        return
    for start in range(0, tile.shape[1], VOCABULARY_BLOCK):
        classes = slice(start, start + VOCABULARY_BLOCK)
        part = torch.mm(tile[:, classes].t(), scaled)
        if unit is not None:
            part = part.to(s.dtype).mul_(unit)
        if first:
            sums.weight_grad[classes].copy_(part)
        else:
            sums.weight_grad[classes].add_(part)
