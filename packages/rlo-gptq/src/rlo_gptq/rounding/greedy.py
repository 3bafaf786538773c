r"""Greedy passes: coordinate descent on the proxy loss, and least squares on the scales.

A pass visits every column once and moves it to the grid value that is best with all others fixed,
:math:`q_j \leftarrow Q(q_j - G_j / H_{jj})` for the gradient :math:`G = H (q - w)`. Because the
move goes to the nearest *grid* value, clamped codes included, the loss cannot rise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.rounding.feedback import STRIP, TILE, kernels_apply
from rlo_gptq.rounding.grids import Grid, ScalarGrid, stored
from rlo_gptq.settings import ScaleDtype

# Outputs whose temporaries exist at one time, where the outputs do not depend on each other: as
# many as make the matrix products efficient.
OUTPUTS = 256


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
    """

    weight: Tensor
    hessian: Tensor
    codes: Tensor
    values: Tensor
    gradient: Tensor
    order: Tensor

    def loss(self) -> Tensor:
        """Return the proxy loss of every row of W, float64 (m,)."""
        return ((self.values - self.weight) * self.gradient).sum(0, dtype=torch.float64)

    def refresh(self) -> None:
        """Recompute the gradient from the values, in place of the one kept by updates."""
        for begin in range(0, self.weight.shape[1], OUTPUTS):
            part = slice(begin, begin + OUTPUTS)
            self.gradient[:, part] = self.hessian @ (self.values[:, part] - self.weight[:, part])


def start(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, order: Tensor) -> Rounding:
    """Return the state after a first rounding; all arguments in the order of visiting."""
    values = torch.empty_like(codes)
    for begin in range(0, len(codes), STRIP):
        rows = slice(begin, begin + STRIP)
        values[rows] = grid.values(codes[rows], order[rows])
    state = Rounding(weight, hessian, codes, values, torch.empty_like(weight), order)
    state.refresh()
    return state


def greedy_pass(state: Rounding, grid: Grid, *, block_size: int = 128) -> int:
    """Visit every column once; return how many codes changed.

    Exact although blocked: inside a tile the gradient is updated after every column, between tiles
    and between blocks by one matrix product.
    """
    H, codes, values, gradient = state.hessian, state.codes, state.values, state.gradient
    # A column that no input moves has no best value; it keeps the one it has.
    steps = torch.where(H.diagonal() > 0, -1 / H.diagonal(), 0.0)
    block = _kernel_block if kernels_apply(values, grid) else _torch_block
    changed = 0
    for begin in range(0, len(values), block_size):
        rows = slice(begin, min(begin + block_size, len(values)))
        before = codes[rows].clone()
        moved = torch.zeros_like(values[rows])
        local = gradient[rows].clone()
        block(
            local,
            values[rows],
            H[rows, rows],
            codes[rows],
            moved,
            grid,
            state.order[rows],
            steps[rows],
        )
        changes = int((before != codes[rows]).sum())
        changed += changes
        if changes:
            gradient.addmm_(H[:, rows], moved)
    return changed


def _kernel_block(
    local: Tensor,
    values: Tensor,
    hessian: Tensor,
    codes: Tensor,
    moved: Tensor,
    grid: Grid,
    order: Tensor,
    steps: Tensor,
) -> None:
    from rlo_gptq.rounding.triton_kernels import greedy_block

    if not isinstance(grid, ScalarGrid):
        raise TypeError("the kernel rounds to scalar grids only")
    greedy_block(local, values, hessian, codes, moved, grid, order, steps)


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


def refit_scales(state: Rounding, grid: Grid, *, per_tensor: bool, scale_dtype: ScaleDtype) -> None:
    r"""Move every scale to its least-squares value, group after group; the loss cannot rise.

    With u the unscaled values of a group, :math:`s \leftarrow s - u^T G / u^T H u`, then rounded to
    the type it is stored in; a scale is kept where rounding or its sign would undo the gain.
    """
    group = grid.group[state.order]
    scales = grid.scales.clone()
    outputs = state.weight.shape[1]
    step = outputs if per_tensor else OUTPUTS
    for g in range(scales.shape[0]):
        # A slice where a group is all columns, so that nothing is copied.
        rows = slice(None) if scales.shape[0] == 1 else (group == g).nonzero()[:, 0]
        units = _units(state, grid, rows)
        across = state.hessian[:, rows]
        for begin in range(0, outputs, step):
            part = slice(begin, min(begin + step, outputs))
            unit = units[:, part]
            gradient, values = state.gradient[:, part], state.values[:, part]
            influence = across @ unit  # H u, (d, outputs)
            curvature = (unit * influence[rows]).sum(0)
            slope = (unit * gradient[rows]).sum(0)
            if per_tensor:
                curvature, slope = curvature.sum().expand_as(slope), slope.sum().expand_as(slope)
            scale = scales[g, part]
            best = scale - slope / curvature.clamp(min=torch.finfo(slope.dtype).tiny)
            kept = stored(best, scale_dtype)
            better = (curvature > 0) & (kept > 0) & ((kept - best).abs() < (scale - best).abs())
            change = torch.where(better, kept - scale, torch.zeros_like(kept))
            scale += change
            gradient.addcmul_(influence, change)
            values[rows] += unit * change
    grid.set_scales(scales)


def _units(state: Rounding, grid: Grid, rows: Tensor | slice) -> Tensor:
    """Return the unscaled values of some rows, (n, m), made strip by strip."""
    numbers = torch.arange(len(state.order), device=state.order.device)[rows]
    units = state.codes.new_empty(len(numbers), state.codes.shape[1])
    for begin in range(0, len(numbers), STRIP):
        strip = numbers[begin : begin + STRIP]
        units[begin : begin + STRIP] = grid.units(state.codes[strip], state.order[strip])
    return units
