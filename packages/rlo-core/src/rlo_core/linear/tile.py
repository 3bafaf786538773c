"""A tile of logits to per-row loss, row scale and gradient tile; the part that a link changes.

The gradient of a row's loss by its logits is `scale * G`: `scale` is `link'(ce)`, one number per
row, and `G = softmax - onehot` overwrites the logits. The two stay apart, because folding a scale
of slope/N into the tile would flush 97 % of it to zero in float16.

The tile is worked on a few rows at a time, in one scratch of the working precision: the block stays
in the cache over all the passes, and a half-precision tile never has a float32 copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlo_core.links import Link

BLOCK_ELEMENTS = 1 << 17
"""Logits per block and thread: 512 KiB of float32, half of an L2 cache."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def rows_at_a_time(tile: Tensor) -> int:
    if tile.device.type != "cpu":
        return max(tile.shape[0], 1)  # a launch per block costs more than the cache gives
    elements = BLOCK_ELEMENTS * torch.get_num_threads()
    return max(1, min(tile.shape[0], elements // max(tile.shape[1], 1)))


def capped(
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
    step = rows_at_a_time(tile)
    in_place = tile.device.type == "cpu"  # its kernel reads a row before it writes it
    scratch = None
    if work != tile.dtype:
        scratch = tile.new_empty((min(step, tile.shape[0]), tile.shape[1]), dtype=work)
    for start in range(0, tile.shape[0], step):
        block = tile[start : start + step]
        y = target[start : start + step].unsqueeze(1)
        z = capped(block, work, softcap, scratch)
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
