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


def bounded_feedback(hessian: Tensor, *, tolerance: float = 1e-5) -> Tensor:
    """Return N^T, strictly lower triangular (d, d), for a Hessian in the order of visiting.

    At most 100 steps, fewer once a step moves Z by less than `tolerance` of its norm.
    """
    # The update solves with leading blocks of the matrix, so it visits from the last column on.
    target = hessian.flip(0, 1).div_(hessian.diagonal().max())
    inverse = inverse_factor(target)
    target.mul_(-2).tril_(-1)
    Z = torch.zeros_like(target)
    dual = torch.zeros_like(target)
    for _ in range(STEPS):
        # Row i of X minimises over its first i - 1 entries: one solve with a leading block each,
        # all of them at once through the inverse of the one Cholesky factor.
        shifted = ((Z - dual).mul_(PENALTY).add_(target) @ inverse.T).tril_(-1) @ inverse
        shifted += dual
        torch.div(shifted, shifted.norm(dim=0).clamp(min=1.0), out=dual)
        moved = Z.sub_(dual).norm()
        Z, dual = dual, shifted.sub_(dual)
        if moved <= tolerance * Z.norm():
            break
    del target, inverse, dual, shifted
    Z.diagonal().fill_(1)
    eye = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    feedback = torch.linalg.solve_triangular(Z, eye, upper=False, unitriangular=True)
    upper: Tensor = feedback.tril_(-1).flip(0, 1)
    return upper.T.contiguous()


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the inverse of the lower Cholesky factor of 2 H + PENALTY, for H (d, d)."""
    damped = 2 * matrix
    damped.diagonal().add_(PENALTY)
    lower = torch.linalg.cholesky(damped)
    del damped
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse
