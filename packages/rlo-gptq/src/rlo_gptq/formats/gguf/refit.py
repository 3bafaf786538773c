r"""Scales and offsets of blocks moved together after rounding, by least squares in the Hessian's
norm.

With the codes held, a value is linear in its block's d and d_min: :math:`q_j = d\,a_j - d_{min}\,
b_j`, where a is the sub-block's integer times the code's unit and b the sub-block's minimum. The
two are hardly independent (codes are not negative), so that moving one at a time would crawl: each
block's two are solved for together, and a line search along the steps of all blocks of a row says
how far they go.
"""

from __future__ import annotations

import torch

from rlo_gptq.formats.gguf.fit import half
from rlo_gptq.formats.gguf.grids import BlockGrid
from rlo_gptq.rounding.greedy import Rounding

_ROUNDS = 3


def refit_blocks(state: Rounding, grid: BlockGrid) -> None:
    """Move d and d_min of every block of a type that stores an offset; no row's loss rises.

    Args:
        state: What was rounded.
        grid: To; its scales and offsets are replaced.
    """
    for _ in range(_ROUNDS):
        if not _refit_once(state, grid):
            return


def _refit_once(state: Rounding, grid: BlockGrid) -> bool:
    H, group, order = state.hessian, grid.group[state.order], state.order
    a = grid.units(state.codes, order)
    b = grid.offset_units(order)
    at = torch.argsort(group, stable=True).view(len(grid.scales), -1)
    block = H[at[:, :, None], at[:, None]]  # (blocks, columns, columns)
    own_a, own_b, slope = a[at], b[at], state.gradient[at]
    h_a, h_b = torch.bmm(block, own_a), torch.bmm(block, own_b)
    aa, ab, bb = (own_a * h_a).sum(1), (own_a * h_b).sum(1), (own_b * h_b).sum(1)
    ga, gb = (own_a * slope).sum(1), (own_b * slope).sum(1)
    tiny = torch.finfo(aa.dtype).tiny
    det = aa * bb - ab.square()
    sound = det > 1e-5 * aa * bb
    det = det.clamp(min=tiny)
    step_a = torch.where(sound, (ab * gb - bb * ga) / det, -ga / aa.clamp(min=tiny))
    step_b = torch.where(sound, (ab * ga - aa * gb) / det, 0.0)
    direction = a * step_a[group] + b * step_b[group]
    fall = -(direction * state.gradient).sum(0)
    bend = (direction * (H @ direction)).sum(0)
    length = (fall / bend.clamp(min=tiny)).clamp_(0, 1)
    wanted = grid.scales + length * step_a
    scales = half(wanted)
    # The offset makes up for what rounding d to half precision has moved.
    moved = torch.where(bb > 0, ab * (scales - wanted) / bb.clamp(min=tiny), 0.0)
    offsets = half(grid.offsets + length * step_b - moved)
    good = (scales > 0) & torch.isfinite(scales) & torch.isfinite(offsets)
    if grid.kind.two_level:
        good &= offsets >= 0
    change_a = torch.where(good, scales - grid.scales, 0.0)
    change_b = torch.where(good, offsets - grid.offsets, 0.0)
    direction = a * change_a[group] + b * change_b[group]
    push = H @ direction
    # Rounding to half precision may undo the gain.
    gained = (direction * torch.add(push, state.gradient, alpha=2)).sum(0) < 0
    if not bool(gained.any()):
        return False
    kept = gained.to(push.dtype)
    state.gradient.addcmul_(push, kept)
    state.values.addcmul_(direction, kept)
    grid.set_scales(grid.scales + change_a * kept, offsets=grid.offsets + change_b * kept)
    return True
