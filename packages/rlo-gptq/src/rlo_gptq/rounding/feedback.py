r"""Rounding with triangular feedback: GPTQ and LDLQ, which are one algorithm.

With :math:`H = (I + N) D (I + N)^T`, N strictly upper triangular in the order of visiting, the loss
is :math:`\sum_j D_j \| x_j - q_j \|^2` for :math:`x_j = w_j + \sum_{i<j} (w_i - q_i) N_{ij}`: so
rounding :math:`x_j` to the nearest is the best that can be done column by column. GPTQ writes the
same numbers through the Cholesky factor of :math:`H^{-1}`; this form needs no inverse.

Source: QuIP (2307.13304), section 3; GPTQ (2210.17323), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from rlo_gptq.rounding.grids import Grid, ScalarGrid

# Columns rounded between two matrix products inside a block. A rank-1 update of 16 rows costs as
# much as one operator call, so that the loop over columns is bound by calls, not by memory.
TILE = 16
COPY_ROWS = 128  # rows of a matrix that are copied at one time where it is changed in place
LARGEST_BLOCK = 128
"""Columns of a block on CUDA at most: with 512 the kernels' registers spill kilobytes."""


@dataclass
class Factor:
    """The factor of a Hessian in the order of visiting.

    Args:
        feedback: N^T, strictly lower triangular, (d, d).
        diagonal: D, (d,).
    """

    feedback: Tensor
    diagonal: Tensor


def factor(hessian: Tensor) -> Factor:
    """Factor H (d, d), in the order of visiting; float64 is tried where float32 is too coarse.

    Raises:
        ValueError: H is not positive definite even with 1 % more damping in float64.
    """
    for dtype, extra in ((hessian.dtype, 0.0), (torch.float64, 0.0), (torch.float64, 0.01)):
        # One buffer from here to the result. LAPACK writes a factor over its matrix if that is
        # stored by columns, as the transposed view of a symmetric matrix is.
        matrix = hessian.flip(0, 1).to(dtype)
        if extra:
            matrix.diagonal().add_(extra * matrix.diagonal().mean())
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix.T, out=(matrix.T, info))
        if not int(info):
            break
    else:
        raise ValueError("the Hessian must be positive semi-definite, got an indefinite one")
    # The matrix holds L^T, and its reverse U^T with H = U U^T, U = (I + N) sqrt(D).
    reverse_(matrix)
    diagonal = matrix.diagonal().clone()
    matrix.div_(diagonal[:, None])
    matrix.diagonal().zero_()
    return Factor(matrix.to(hessian.dtype), diagonal.square().to(hessian.dtype))


def reverse_(matrix: Tensor) -> Tensor:
    """Reverse rows and columns of a square matrix in place, in strips; returns the matrix."""
    d = len(matrix)
    half = d // 2
    for start in range(0, half, COPY_ROWS):
        stop = min(start + COPY_ROWS, half)
        upper, lower = matrix[start:stop], matrix[d - stop : d - start]
        kept = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(kept)
    if d % 2:
        matrix[half] = matrix[half].flip(0)
    return matrix


def round_with_feedback(
    weight: Tensor,
    feedback: Tensor,
    grid: Grid,
    order: Tensor,
    *,
    block_size: int = 128,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round the columns in order, each after the feedback of the errors made so far.

    Inside a block, tiles of 16 columns are rounded one by one; what a tile or a block passes on is
    one matrix product.

    Args:
        weight: (d, m), transposed, rows already in the order of visiting.
        feedback: N^T (d, d) in the order of visiting.
        grid: where to round to; asked for columns by their own number.
        order: (d,) the number of each visited column.
        block_size: columns per outer block.
        noise: (d, m) added before rounding to nearest; in [-1/2, 1/2) codes it makes rounding
            stochastic and unbiased.

    Returns:
        Codes (d, m) and targets x (d, m), both in the order of visiting.
    """
    d = weight.shape[0]
    codes = torch.empty_like(weight)
    targets = weight.clone()
    errors = torch.empty_like(weight)
    if noise is None and kernels_apply(weight, grid):
        groups = grid.group[order].to(torch.int32)
        size = min(block_size, LARGEST_BLOCK)
        for rows in _blocks(d, size):
            if rows.start:
                targets[rows].addmm_(feedback[rows, : rows.start], errors[: rows.start])
            _kernel_block(
                targets[rows],
                weight[rows],
                feedback[rows, rows],
                codes[rows],
                errors[rows],
                grid,
                groups[rows],
            )
        return codes, targets
    for rows in _blocks(d, block_size):
        if rows.start:
            targets[rows].addmm_(feedback[rows, : rows.start], errors[: rows.start])
        _torch_block(
            targets[rows],
            weight[rows],
            feedback[rows, rows],
            codes[rows],
            errors[rows],
            grid,
            order[rows],
            None if noise is None else noise[rows],
        )
    return codes, targets


def _blocks(d: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]


def kernels_apply(weight: Tensor, grid: Grid) -> bool:
    """Return whether the Triton kernels can round this matrix: CUDA, float32, a scalar grid."""
    return (
        weight.is_cuda
        and weight.dtype == torch.float32
        and type(grid) is ScalarGrid
        and find_spec("triton") is not None
    )


def _kernel_block(
    targets: Tensor,
    weight: Tensor,
    feedback: Tensor,
    codes: Tensor,
    errors: Tensor,
    grid: Grid,
    groups: Tensor,
) -> None:
    from rlo_gptq.rounding.triton_kernels import feedback_block

    if not isinstance(grid, ScalarGrid):
        raise TypeError("the kernel rounds to scalar grids only")
    feedback_block(targets, weight, feedback, codes, errors, grid, groups)


def _torch_block(
    targets: Tensor,
    weight: Tensor,
    feedback: Tensor,
    codes: Tensor,
    errors: Tensor,
    grid: Grid,
    order: Tensor,
    noise: Tensor | None,
) -> None:
    """Round one block in tiles: rank-1 updates in a tile, one matrix product between tiles."""
    columns = order.tolist()
    groups = grid.group[order].tolist() if noise is None and type(grid) is ScalarGrid else None
    value = torch.empty_like(weight[0])
    for low in range(0, len(weight), TILE):
        high = min(low + TILE, len(weight))
        tile = slice(low, high)
        if low:
            targets[tile].addmm_(feedback[tile, :low], errors[:low])
        if groups is not None and len(set(groups[low:high])) == 1 and isinstance(grid, ScalarGrid):
            _code_units_tile(
                targets[tile],
                weight[tile],
                feedback[tile, tile],
                codes[tile],
                errors[tile],
                grid,
                groups[low],
            )
            continue
        for j in range(low, high):
            target = targets[j] if noise is None else targets[j] + noise[j]
            grid.round_column(target, columns[j], codes[j], value)
            torch.sub(weight[j], value, out=errors[j])
            if j + 1 < high:
                targets[j + 1 : high].addr_(feedback[j + 1 : high, j], errors[j])


def _code_units_tile(
    targets: Tensor,
    weight: Tensor,
    feedback: Tensor,
    codes: Tensor,
    errors: Tensor,
    grid: ScalarGrid,
    group: int,
) -> None:
    """Round a tile whose columns share a scale in units of it: half of the calls for a column."""
    inverse, zero, scale = grid.inverse[group], grid.zeros[group], grid.scales[group]
    target, wanted = torch.addcmul(zero, targets, inverse), torch.addcmul(zero, weight, inverse)
    count = len(codes)
    rows = zip(target.unbind(0), wanted.unbind(0), codes.unbind(0), errors.unbind(0), strict=True)
    for j, (at, want, code, error) in enumerate(rows):
        torch.round(at, out=code)
        code.clamp_(0, grid.top)
        torch.sub(want, code, out=error)
        if j + 1 < count:
            target[j + 1 :].addr_(feedback[j + 1 :, j], error)
    torch.sub(target, zero, out=targets).mul_(scale)
    # A scale of 0 has one code, and all of the weight for an error.
    if not inverse.all():
        codes.copy_(torch.where(inverse > 0, codes, zero.round().clamp(0, grid.top)))
    torch.sub(codes, zero, out=target).mul_(scale)
    torch.sub(weight, target, out=errors)
