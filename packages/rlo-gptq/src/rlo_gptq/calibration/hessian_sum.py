r"""The second moment of a layer's inputs, :math:`H = \sum_t w_t x_t x_t^T / \sum_t w_t`, summed
exactly enough.

A plain float32 sum over 10^5 tokens loses about three digits; here every addition's rounding error
is kept in a second float32 matrix (Knuth's TwoSum), which is as good as float64 and runs on any
device.
"""

from __future__ import annotations

import torch
from rlo_core.errors import RLOError
from torch import Tensor

SUM_ROWS = 192
"""Rows of H that are updated at one time, up to their diagonal block: the products need no third
matrix, and half of them are not computed."""


class CalibrationError(RLOError):
    """Calibration that cannot go on: no tokens, or activations that are not finite."""


class HessianSum:
    """A running sum of outer products of the inputs of one or more layers, its lower triangle.

    Args:
        features: Width of the inputs.
        device: Where the sum is kept.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.carry = torch.zeros_like(self.total)
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Add inputs of shape (..., features), each token with its weight (default 1).

        Args:
            x: Floating; computed in float32.
            token_weight: Shape (...), at least 0.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        left = rows
        if token_weight is None:
            self.weight += rows.shape[0]
        else:
            weights = token_weight.detach().reshape(-1).float()
            self.weight += float(weights.double().sum())
            left = rows * weights[:, None]
        self.tokens += rows.shape[0]
        for start in range(0, self.total.shape[0], SUM_ROWS):
            stop = min(start + SUM_ROWS, self.total.shape[0])
            term = left[:, start:stop].T @ rows[:, :stop]
            total, carry = self.total[start:stop, :stop], self.carry[start:stop, :stop]
            new = total + term
            virtual = new - total
            carry += (total - (new - virtual)) + term.sub_(virtual)
            total.copy_(new)

    def mean(self, name: str) -> Tensor:
        """Return H, (features, features), float32; the sum's memory is reused.

        Args:
            name: Of the layer, for an error.

        Raises:
            CalibrationError: an input was NaN or infinite.
        """
        if not bool(torch.isfinite(self.total.diagonal()).all()):
            raise CalibrationError(
                f"inputs of layer {name!r} must be finite, got NaN or infinity; "
                "try --dtype float32, or look at the model"
            )
        weight = float(self.weight)
        if weight == 0:
            # An expert that no token chose: every direction counts the same.
            return torch.eye(self.total.shape[0], device=self.total.device)
        hessian = self.total.add_(self.carry).div_(weight)
        del self.total, self.carry
        # The strips' products are symmetric only to rounding.
        return symmetrize_(hessian)


def symmetrize_(matrix: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in strips; returns the matrix."""
    for start in range(0, matrix.shape[0], SUM_ROWS):
        stop = min(start + SUM_ROWS, matrix.shape[0])
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        square = matrix[start:stop, start:stop]
        square.copy_(torch.tril(square) + torch.tril(square, -1).T)
    return matrix
