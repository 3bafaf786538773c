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
    H = hessian.flip(0, 1) / hessian.diagonal().max()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    lower = torch.linalg.cholesky(2 * H + PENALTY * eye)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    target = -2 * H.tril(-1)
    Z = torch.zeros_like(H)
    dual = torch.zeros_like(H)
    for _ in range(STEPS):
        # Row i of X minimises over its first i - 1 entries: one solve with a leading block each,
        # all of them at once through the inverse of the one Cholesky factor.
        X = ((PENALTY * (Z - dual) + target) @ inverse.T).tril(-1) @ inverse
        shifted = X + dual
        previous, Z = Z, shifted / shifted.norm(dim=0).clamp(min=1.0)
        dual = shifted - Z
        if (Z - previous).norm() <= tolerance * Z.norm():
            break
    feedback = torch.linalg.solve_triangular(Z + eye, eye, upper=False, unitriangular=True)
    upper: Tensor = feedback.tril(-1).flip(0, 1)
    return upper.T.contiguous()
