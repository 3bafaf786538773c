r"""Greedy passes: coordinate descent on the proxy loss, and least squares on the scales.

A pass visits every column once and moves it to the grid value that is best with all others fixed,
:math:`q_j \leftarrow Q(q_j - G_j / H_{jj})` for the gradient :math:`G = H (q - w)`. Because the
move goes to the nearest *grid* value, clamped codes included, the loss cannot rise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.rounding.feedback import COPY_ROWS, LARGEST_BLOCK, TILE, kernels_apply
from rlo_gptq.rounding.grids import Grid, ScalarGrid, group_runs, inverse_of, nearest_stored
from rlo_gptq.settings import ScaleDtype

# Outputs whose temporaries exist at one time, where the outputs do not depend on each other: as
# many as make the matrix products efficient on a CPU. A GPU takes all in one go.
OUTPUTS = 256
# Columns whose moves are proposed together, and the share of outputs that move below which the
# gradient of those alone is updated.
PROPOSED = 64
FEW = 0.3


def parts_of(x: Tensor) -> list[slice]:
    """Return slices of the outputs of x (d, m), as many at a time as suits its device."""
    m = x.shape[1]
    step = m if x.is_cuda else OUTPUTS
    return [slice(begin, min(begin + step, m)) for begin in range(0, m, step)]


@dataclass
class Rounding:
    """A matrix being rounded; every tensor is transposed, with its rows in the order of visiting.

    Args:
        weight: w (d, m).
        hessian: H (d, d).
        codes: (d, m).
        values: q (d, m), the values of the codes.
        gradient: H (q - w), (d, m).
        order: (d,) the number of each visited column.
        pull: H w, (d, m), kept from the first refit of one scale for a row; None before.
    """

    weight: Tensor
    hessian: Tensor
    codes: Tensor
    values: Tensor
    gradient: Tensor
    order: Tensor
    pull: Tensor | None = None

    def loss(self) -> Tensor:
        """Return the proxy loss of every row of W, float64 (m,)."""
        return ((self.values - self.weight) * self.gradient).sum(0, dtype=torch.float64)

    def refresh(self) -> None:
        """Recompute the gradient from the values, in place of the one kept by updates."""
        for part in parts_of(self.weight):
            self.gradient[:, part] = self.hessian @ (self.values[:, part] - self.weight[:, part])


def start(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, order: Tensor) -> Rounding:
    """Return the state after a first rounding; all arguments in the order of visiting."""
    values = torch.empty_like(codes)
    strip = len(codes) if codes.is_cuda else COPY_ROWS
    for begin in range(0, len(codes), strip):
        rows = slice(begin, begin + strip)
        values[rows] = grid.values(codes[rows], order[rows])
    state = Rounding(weight, hessian, codes, values, torch.empty_like(weight), order)
    state.refresh()
    return state


def greedy_pass(state: Rounding, grid: Grid, *, block_size: int = 128) -> Tensor:
    """Visit every column once; return how many codes changed, int64 (), on the state's device.

    Exact although blocked: inside a tile the gradient is updated after every column, between tiles
    and between blocks by one matrix product.
    """
    H, codes, values, gradient = state.hessian, state.codes, state.values, state.gradient
    # A column that no input moves has no best value; it keeps the one it has.
    steps = inverse_of(H.diagonal()).neg_()
    kernels = kernels_apply(values, grid)
    size = min(block_size, LARGEST_BLOCK) if kernels else block_size
    before = codes.clone()
    if kernels:
        groups = grid.group[state.order].to(torch.int32)
    for begin in range(0, len(values), size):
        rows = slice(begin, min(begin + size, len(values)))
        if kernels:
            moved = torch.empty_like(values[rows])
            _kernel_block(
                gradient[rows],
                values[rows],
                H[rows, rows],
                codes[rows],
                moved,
                grid,
                groups[rows],
                steps[rows],
            )
            gradient.addmm_(H[:, rows], moved)
            continue
        moved = torch.zeros_like(values[rows])
        block = _proposed_block if type(grid) is ScalarGrid else _torch_block
        block(
            gradient[rows].clone(),
            values[rows],
            H[rows, rows],
            codes[rows],
            moved,
            grid,
            state.order[rows],
            steps[rows],
        )
        _pass_on(gradient, H[:, rows], moved)
    return (before != codes).sum()


def _pass_on(gradient: Tensor, hessian: Tensor, moved: Tensor) -> None:
    """Add H moved to the gradient (d, m), of those outputs alone that moved where they are few."""
    outputs = moved.any(0).nonzero()[:, 0]
    if not len(outputs):
        return
    if len(outputs) > FEW * moved.shape[1]:
        gradient.addmm_(hessian, moved)
    else:
        gradient.index_add_(1, outputs, hessian @ moved[:, outputs])


def _kernel_block(
    local: Tensor,
    values: Tensor,
    hessian: Tensor,
    codes: Tensor,
    moved: Tensor,
    grid: Grid,
    groups: Tensor,
    steps: Tensor,
) -> None:
    from rlo_gptq.rounding.triton_kernels import greedy_block

    if not isinstance(grid, ScalarGrid):
        raise TypeError("the kernel rounds to scalar grids only")
    greedy_block(local, values, hessian, codes, moved, grid, groups, steps)


def _proposed_block(
    local: Tensor,
    values: Tensor,
    hessian: Tensor,
    codes: Tensor,
    moved: Tensor,
    grid: Grid,
    order: Tensor,
    steps: Tensor,
) -> None:
    """Move one block of a scalar grid in tiles, by proposals for all columns of a tile at once.

    The first column of an output that would move sees the gradient of the tile's beginning, so its
    move is final, and those before it stay; the proposals for the columns behind it are then made
    again, for the outputs that moved alone. Few move, so this is the column-by-column result in a
    fraction of its calls.
    """
    if not isinstance(grid, ScalarGrid):
        raise TypeError("proposals are made for scalar grids only")
    for low in range(0, len(values), PROPOSED):
        tile = slice(low, low + PROPOSED)
        if low:
            local[tile].addmm_(hessian[tile, :low], moved[:low])
        curve, step_of = hessian[tile, tile], steps[tile, None]
        own = grid.group[order[tile]] if len(grid.scales) > 1 else slice(0, 1)
        tables = [local[tile], values[tile], codes[tile]]
        tables += [grid.inverse[own], grid.zeros[own], grid.scales[own]]
        # By falling numbers, the first column is the largest.
        rank = torch.arange(len(curve), 0, -1, dtype=torch.uint8, device=values.device)[:, None]
        outputs, first = None, None
        while True:
            slope, value, code, inverse, zero, scale = tables
            target = torch.addcmul(value, slope, step_of)
            wanted = torch.addcmul(zero, target, inverse).round_().clamp_(0, grid.top)
            moves = (wanted != code).view(torch.uint8).mul_(rank)
            if first is not None:
                moves.masked_fill_(rank >= rank[first].T, 0)
            best = moves.amax(0)
            which = best.nonzero()[:, 0]
            if not len(which):
                break
            first = len(curve) - best[which].to(torch.int64)
            outputs = which if outputs is None else outputs[which]
            tables = [table[:, which] for table in tables]
            slope, value, code, inverse, zero, scale = tables
            each = torch.arange(len(which), device=values.device)
            at = (first, each) if len(inverse) > 1 else (0, each)
            new = wanted[first, which]
            new_value = (new - zero[at]) * scale[at]
            step = new_value - value[first, each]
            codes[low + first, outputs] = new
            values[low + first, outputs] = new_value
            moved[low + first, outputs] = step
            slope.addcmul_(curve[:, first], step)


def _torch_block(
    local: Tensor,
    values: Tensor,
    hessian: Tensor,
    codes: Tensor,
    moved: Tensor,
    grid: Grid,
    order: Tensor,
    steps: Tensor,
) -> None:
    """Move one block in tiles: rank-1 updates in a tile, one matrix product between tiles."""
    columns, step_of = order.tolist(), steps.tolist()
    value, target = torch.empty_like(values[0]), torch.empty_like(values[0])
    for low in range(0, len(values), TILE):
        high = min(low + TILE, len(values))
        if low:
            local[low:high].addmm_(hessian[low:high, :low], moved[:low])
        for j in range(low, high):
            torch.add(values[j], local[j], alpha=step_of[j], out=target)
            grid.improve_column(target, columns[j], codes[j], value)
            torch.sub(value, values[j], out=moved[j])
            values[j].copy_(value)
            if j + 1 < high:
                local[j + 1 : high].addr_(hessian[j + 1 : high, j], moved[j])


def refit_scales(state: Rounding, grid: Grid, *, group_size: int, scale_dtype: ScaleDtype) -> None:
    r"""Move the scales of every row by least squares; the loss cannot rise.

    With u the unscaled values, :math:`s \leftarrow s - u^T G / u^T H u`, then rounded to the type
    it is stored in; a scale is kept where rounding or its sign would undo the gain. One scale for a
    row needs no product after the first: :math:`H u = (G + H w) / s`. Several are moved together.

    Args:
        state: what was rounded.
        grid: to; its scales are replaced.
        group_size: columns of a group, at most 0 for all; 0 also means one scale for the matrix.
        scale_dtype: type in which scales are stored.
    """
    if hasattr(grid, "refit") and grid.refit(state):  # of another format, with offsets
        return
    if len(grid.scales) > 1:
        d, groups = len(state.weight), len(grid.scales)
        runs = group_runs(d, group_size)
        # Grids of other formats have groups of their own, all of one size.
        if runs[-1][1] != groups:
            runs = group_runs(d, d // groups)
        _refit_groups(state, grid, runs, scale_dtype)
        return
    H, scales = state.hessian, grid.scales.clone()
    inverse = inverse_of(scales)
    # Values of other grids need not be their units times a scale.
    proportional = type(grid) is ScalarGrid
    pull = state.pull
    first = pull is None
    if pull is None and proportional:
        pull = state.pull = torch.empty_like(state.weight)
    per_tensor = group_size == 0
    whole = [slice(0, state.weight.shape[1])]
    independent = proportional and not per_tensor
    for part in parts_of(state.weight) if independent else whole:
        gradient, scale = state.gradient[:, part], scales[0, part]
        unit = _units(state, grid, part)
        if first or pull is None:
            influence = H @ unit
            if pull is not None:
                torch.addcmul(-gradient, influence, scale, out=pull[:, part])
        else:
            influence = (gradient + pull[:, part]).mul_(inverse[0, part])
        curvature, slope = (unit * influence).sum(0), (unit * gradient).sum(0)
        if per_tensor:
            curvature, slope = curvature.sum().expand_as(slope), slope.sum().expand_as(slope)
        change = _change(scale, slope, curvature, scale_dtype)
        scale += change
        gradient.addcmul_(influence, change)
        state.values[:, part].addcmul_(unit, change)
    grid.set_scales(scales)


def _units(state: Rounding, grid: Grid, part: slice) -> Tensor:
    """Return the unscaled values of some outputs, (d, some)."""
    if type(grid) is ScalarGrid:
        return grid.units(state.codes[:, part], state.order, part)
    return grid.units(state.codes, state.order)[:, part]  # of a trellis, outputs make sequences


def _change(scale: Tensor, slope: Tensor, curvature: Tensor, scale_dtype: ScaleDtype) -> Tensor:
    """Return what to add to scales, towards the minimum of a parabola, or 0."""
    best = scale - slope / curvature.clamp(min=torch.finfo(slope.dtype).tiny)
    return _towards(best, scale, curvature > 0, scale_dtype)


def _towards(best: Tensor, scale: Tensor, allowed: Tensor, scale_dtype: ScaleDtype) -> Tensor:
    """Return the change from scales to the best ones as they can be stored, or 0."""
    kept = nearest_stored(best, scale_dtype)
    # Scales are stored ones, so that none of them is nearer to the best than this.
    better = allowed & (kept > 0) & (kept < torch.inf)
    return torch.where(better, kept - scale, 0.0)


def _refit_groups(
    state: Rounding, grid: Grid, runs: list[tuple[int, int, int]], scale_dtype: ScaleDtype
) -> None:
    """Move the scales of all groups of each row together, where the loss falls by it.

    The step of every group by itself gives a direction, and a line search along it its length.
    """
    H, group = state.hessian, grid.group[state.order]
    order = torch.argsort(group, stable=True)
    scales = grid.scales.clone()
    independent = type(grid) is ScalarGrid
    whole = [slice(0, state.weight.shape[1])]
    for part in parts_of(state.weight) if independent else whole:
        gradient, scale = state.gradient[:, part], scales[:, part]
        unit = _units(state, grid, part)
        slope = torch.zeros_like(scale).index_add_(0, group, unit * gradient)
        curvature = torch.zeros_like(scale)
        done = 0
        for first, last, width in runs:
            rows = order[done : done + (last - first) * width].view(-1, width)
            done += rows.numel()
            own = unit[rows]  # (groups, width, outputs)
            block = H[rows[:, :, None], rows[:, None]]
            curvature[first:last] = (own * torch.bmm(block, own)).sum(1)
        step = -slope / curvature.clamp(min=torch.finfo(slope.dtype).tiny)
        direction = unit * step[group]
        bend = (direction * (H @ direction)).sum(0)
        fall = -(direction * gradient).sum(0)
        length = (fall / bend.clamp(min=torch.finfo(slope.dtype).tiny)).clamp_(0, 1)
        change = _towards(scale + length * step, scale, curvature > 0, scale_dtype)
        torch.mul(unit, change[group], out=direction)
        push = H @ direction
        # Rounding to the stored type may undo the gain.
        gained = (direction * torch.add(push, gradient, alpha=2)).sum(0) < 0
        change = torch.where(gained, change, 0.0)
        scale += change
        gradient.addcmul_(push, gained.to(push.dtype))
        state.values[:, part].addcmul_(unit, change[group])
    grid.set_scales(scales)
