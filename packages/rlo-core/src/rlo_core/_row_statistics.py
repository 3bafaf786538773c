"""Numbers of each row of a tile of logits, taken before its gradient overwrites it.

What the gates of `rlo_core.gates` are functions of, and what trainers log. One more pass over a
tile that is in memory anyway: a few percent of the matrix products around it, and N numbers.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Logits per block and thread, as in `rlo_core.linear.tile`: half of an L2 cache."""
NAMES = ("entropy", "top1", "sum_sq", "correct", "top_entropy", "mean_logit")


def tile_statistics(
    tile: Tensor,
    target: Tensor,
    names: Collection[str],
    *,
    softcap: float | None = None,
    top: int = 20,
) -> dict[str, Tensor]:
    """Return numbers of each row's softmax, each (R), in float32 or wider.

    "ce" is always there: -log p of the target, nats, 0 for a target outside [0, C). Of the others
    those that are named: "entropy" in nats; "top1", the largest probability; "sum_sq", the sum of
    squared probabilities; "correct", 1 where the target is the first of the largest; "top_entropy",
    the entropy of the `top` largest, made to sum to 1; "mean_logit", the mean of the logits.

    Args:
        tile: Raw logits, (R, C), any floating dtype; left as it is.
        target: int64, (R).
        names: Of `NAMES`.
        softcap: Logits are `softcap * tanh(logits / softcap)`; None for as they are.
        top: Classes of "top_entropy".
    """
    rows, classes = tile.shape
    work = torch.promote_types(tile.dtype, torch.float32)
    found = {name: tile.new_zeros(rows, dtype=work) for name in ("ce", *names)}
    step = max(rows, 1)
    if tile.device.type == "cpu":
        step = max(1, min(step, BLOCK_ELEMENTS * torch.get_num_threads() // max(classes, 1)))
    for start in range(0, rows, step):
        at = slice(start, start + step)
        z = tile[at].to(work)
        if softcap is not None:
            z = (z / softcap).tanh_().mul_(softcap)
        for name, value in _block(z, target[at], found.keys(), top).items():
            found[name][at] = value
    return found


def _block(z: Tensor, target: Tensor, names: Collection[str], top: int) -> dict[str, Tensor]:
    valid = (target >= 0) & (target < z.shape[1])
    y = target.where(valid, 0).unsqueeze(1)
    largest = z.amax(1, keepdim=True)
    p = torch.softmax(z, -1)
    top1 = p.amax(1)
    at_target = z.gather(1, y)
    ce = ((largest - at_target).squeeze(1) - top1.log()).where(valid, 0.0)
    found = {"ce": ce}
    if "entropy" in names:
        # -log of the largest p, minus the mean of z - max: no two large numbers are subtracted
        mean = torch.bmm(p.unsqueeze(1), (z - largest).unsqueeze(2)).flatten()
        found["entropy"] = (-top1.log() - mean).clamp_(min=0.0)
    if "top1" in names:
        found["top1"] = top1
    if "mean_logit" in names:
        found["mean_logit"] = z.mean(1)
    if "sum_sq" in names:
        found["sum_sq"] = torch.bmm(p.unsqueeze(1), p.unsqueeze(2)).flatten()
    if "correct" in names:
        hit = at_target.squeeze(1) == largest.squeeze(1)
        if bool(hit.any()) if z.device.type == "cpu" else True:
            hit = hit & (z.argmax(1) == y.squeeze(1))
        found["correct"] = (hit & valid).to(z.dtype)
    if "top_entropy" in names:
        log_p = z.topk(min(top, z.shape[1]), dim=1).values.log_softmax(1)
        found["top_entropy"] = -(log_p.exp() * log_p).sum(1)
    return found
