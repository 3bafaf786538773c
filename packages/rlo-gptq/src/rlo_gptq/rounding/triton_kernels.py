"""One block of columns on CUDA: feedback or a greedy pass, one program per tile of rows of W.

A block of columns stays on the chip while its columns are rounded one after the other; what the
block passes on is left to a matrix product outside, as on the CPU.
Tested under TRITON_INTERPRET=1 on a CPU against the torch path; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlo_gptq.rounding.grids import ScalarGrid

ROWS = 32
"""Rows of W in a program: 128 columns of 32 rows are 16 KiB of float32."""
WARPS = 4


@triton.jit
def _nearest(x, inverse, zero, top):  # type: ignore[no-untyped-def]
    """Nearest code, halves to even as torch rounds."""
    at = x * inverse + zero
    code = tl.floor(at + 0.5)
    odd = code - 2.0 * tl.floor(code * 0.5)
    code = tl.where(code - at == 0.5, code - odd, code)
    return tl.minimum(tl.maximum(code, 0.0), top)


@triton.jit  # type: ignore[untyped-decorator]
def _feedback_kernel(  # type: ignore[no-untyped-def]
    targets,
    weight,
    feedback,
    codes,
    errors,
    inverses,
    zeros,
    scales,
    groups,
    count,
    m,
    stride,
    top,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    column = tl.arange(0, COLUMNS)
    tile = column[:, None] * m + row[None, :]
    held = (column[:, None] < count) & inside[None, :]
    target = tl.load(targets + tile, mask=held, other=0.0)
    for j in range(count):
        x = tl.sum(tl.where(column[:, None] == j, target, 0.0), axis=0)
        at = tl.load(groups + j) * m + row
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        code = _nearest(x, tl.load(inverses + at, mask=inside, other=0.0), zero, top)
        value = (code - zero) * tl.load(scales + at, mask=inside, other=0.0)
        error = tl.load(weight + j * m + row, mask=inside, other=0.0) - value
        tl.store(codes + j * m + row, code, mask=inside)
        tl.store(errors + j * m + row, error, mask=inside)
        # Strictly lower triangular: columns already rounded get nothing.
        passed = tl.load(feedback + column * stride + j, mask=column < count, other=0.0)
        target += passed[:, None] * error[None, :]
    tl.store(targets + tile, target, mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _greedy_kernel(  # type: ignore[no-untyped-def]
    gradient,
    values,
    hessian,
    codes,
    moved,
    inverses,
    zeros,
    scales,
    groups,
    steps,
    count,
    m,
    stride,
    top,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    column = tl.arange(0, COLUMNS)
    held = (column[:, None] < count) & inside[None, :]
    slope = tl.load(gradient + column[:, None] * m + row[None, :], mask=held, other=0.0)
    for j in range(count):
        pull = tl.sum(tl.where(column[:, None] == j, slope, 0.0), axis=0)
        old = tl.load(values + j * m + row, mask=inside, other=0.0)
        at = tl.load(groups + j) * m + row
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        inverse = tl.load(inverses + at, mask=inside, other=0.0)
        code = _nearest(old + tl.load(steps + j) * pull, inverse, zero, top)
        value = (code - zero) * tl.load(scales + at, mask=inside, other=0.0)
        step = value - old
        tl.store(codes + j * m + row, code, mask=inside)
        tl.store(values + j * m + row, value, mask=inside)
        tl.store(moved + j * m + row, step, mask=inside)
        curve = tl.load(hessian + column * stride + j, mask=column < count, other=0.0)
        slope += curve[:, None] * step[None, :]


def feedback_block(
    targets: Tensor,
    weight: Tensor,
    feedback: Tensor,
    codes: Tensor,
    errors: Tensor,
    grid: ScalarGrid,
    groups: Tensor,
) -> None:
    """Round the columns of one block in order; fills targets, codes and errors in place.

    Args:
        targets: (block, m) with the feedback of earlier blocks, contiguous float32.
        weight: (block, m).
        feedback: the block of N^T on the diagonal, (block, block), unit stride along a row.
        codes: (block, m), written.
        errors: (block, m), written.
        grid: where to round to.
        groups: (block,) int32, the group of each column.
    """
    count, m = targets.shape
    with torch.cuda.device_of(targets):  # type: ignore[no-untyped-call]
        _feedback_kernel[(triton.cdiv(m, ROWS),)](
            targets,
            weight,
            feedback,
            codes,
            errors,
            grid.inverse,
            grid.zeros,
            grid.scales,
            groups,
            count,
            m,
            feedback.stride(0),
            grid.top,
            COLUMNS=triton.next_power_of_2(count),
            ROWS=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def greedy_block(
    gradient: Tensor,
    values: Tensor,
    hessian: Tensor,
    codes: Tensor,
    moved: Tensor,
    grid: ScalarGrid,
    groups: Tensor,
    steps: Tensor,
) -> None:
    """Move the columns of one block in order; fills values, codes and moved in place.

    Args:
        gradient: G of the block, (block, m), contiguous float32; read only.
        values: (block, m).
        hessian: the block of H on the diagonal, (block, block), unit stride along a row.
        codes: (block, m), written.
        moved: (block, m), written: new values minus old.
        grid: where to round to.
        groups: (block,) int32, the group of each column.
        steps: -1 / H_jj, (block,).
    """
    count, m = gradient.shape
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        _greedy_kernel[(triton.cdiv(m, ROWS),)](
            gradient,
            values,
            hessian,
            codes,
            moved,
            grid.inverse,
            grid.zeros,
            grid.scales,
            groups,
            steps,
            count,
            m,
            hessian.stride(0),
            grid.top,
            COLUMNS=triton.next_power_of_2(count),
            ROWS=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
