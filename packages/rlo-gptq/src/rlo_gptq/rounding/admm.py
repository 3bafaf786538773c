r"""Triangular feedback with bounded columns, by the alternating direction method of multipliers.

LDLQ's feedback minimises :math:`tr((I+Z) H (I+Z)^T)` over strictly triangular Z with
:math:`N = (I+Z)^{-1} - I`; nothing keeps it small, and large feedback pushes targets off the grid.
Here every column of Z has norm at most 1.

Source: QuIP (2307.13304), section 5 and its supplement.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100
PENALTY = 0.1

SMALLEST_BLOCK = 192
MOST_BLOCKS = 16
"""Of a triangle of blocks: few enough products that a GPU's launches do not show."""


def bounded_feedback(hessian: Tensor, *, tolerance: float = 1e-5) -> Tensor:
    """Return N^T, strictly lower triangular (d, d), for a Hessian in the order of visiting.

    At most 100 steps, fewer once a step moves Z by less than `tolerance` of its norm.
    """
    # The update solves with leading blocks of the matrix, so it visits from the last column on.
    target = hessian.flip(0, 1).div_(hessian.diagonal().max())
    inverse = inverse_factor(target)
    target.mul_(-2).tril_(-1)
    Z, dual, work, product = (torch.zeros_like(target) for _ in range(4))
    for _ in range(STEPS):
        # Row i of X minimises over its first i - 1 entries: one solve with a leading block each,
        # all of them at once through the inverse of the one Cholesky factor.
        torch.sub(Z, dual, out=work).mul_(PENALTY).add_(target)
        lower_part(work, inverse.T, product, upper=True).tril_(-1)
        shifted = lower_part(product, inverse, work).add_(dual)
        torch.div(shifted, shifted.norm(dim=0).clamp(min=1.0), out=dual)
        moved = Z.sub_(dual).norm()
        Z, dual, work = dual, shifted.sub_(dual), Z
        if moved <= tolerance * Z.norm():
            break
    del target, inverse, dual, shifted, work, product
    Z.diagonal().fill_(1)
    eye = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    feedback = torch.linalg.solve_triangular(Z, eye, upper=False, unitriangular=True)
    upper: Tensor = feedback.tril_(-1).flip(0, 1)
    return upper.T.contiguous()


def lower_part(a: Tensor, b: Tensor, out: Tensor, *, upper: bool = False) -> Tensor:
    """Compute the lower triangle of A B into `out`, for A lower triangular; return `out`.

    By blocks, without the products that are known to be zero: a quarter of the time of the whole.
    Entries above the diagonal are overwritten in the diagonal blocks only.

    Args:
        a: Shape (d, d), lower triangular.
        b: Shape (d, d), lower triangular, or upper triangular with `upper`.
        out: Shape (d, d), neither `a` nor `b`.
        upper: The form of `b`.
    """
    size = max(SMALLEST_BLOCK, -(-len(a) // MOST_BLOCKS))
    for row in range(0, len(a), size):
        rows = slice(row, row + size)
        for column in range(0, row + 1, size):
            columns = slice(column, column + size)
            inner = slice(0, column + size) if upper else slice(column, row + size)
            torch.mm(a[rows, inner], b[inner, columns], out=out[rows, columns])
    return out


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the inverse of the lower Cholesky factor of 2 H + PENALTY, for H (d, d)."""
    damped = 2 * matrix
    damped.diagonal().add_(PENALTY)
    lower = torch.linalg.cholesky(damped)
    del damped
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse
