r"""A tensor of the checkpoint that is trained in the precision it is stored in.

The model holds the value as it will be stored; Adam moves a float32 copy beside it, and the
gradient at the stored value is taken for the copy's (straight through the rounding), so that steps
smaller than the stored type's add up instead of being lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StoredParameter:
    r"""One trained tensor.

    Scales of a grid are :math:`s e^\theta`: steps are relative and no sign changes. Everything else
    moves in steps of its own root mean square.

    Args:
        name: In the checkpoint.
        parameter: In the model, float32, with the stored value; gets a gradient from here on.
        dtype: In which it is stored.
        relative: :math:`s e^\theta` instead of a sum.
        unit: What a step is a part of; None for the root mean square. Not with `relative`.
        shape: In the checkpoint, to which the parameter is expanded; None for its own.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        dtype: torch.dtype,
        *,
        relative: bool = False,
        unit: float | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.name, self.parameter, self.dtype = name, parameter, dtype
        self.shape = tuple(shape or parameter.shape)
        value = parameter.detach()
        self.start = value.to(dtype).clone() if relative else None
        self.theta = torch.zeros_like(value) if relative else value.clone()
        self._unit = 1.0 if relative else unit
        parameter.requires_grad_(True)

    @property
    def unit(self) -> float:
        """What a step is a part of: a number of its own, or the root mean square at the start."""
        if self._unit is None:
            # Plain sums would differ between runs of other alignment; a norm is one call.
            size = float(torch.linalg.vector_norm(self.theta.detach()))
            self._unit = size / max(1, self.theta.numel()) ** 0.5 or 1.0
        return self._unit

    @property
    def training_bytes(self) -> int:
        """What training takes beside the parameter: what Adam moves, gradient, two moments."""
        return 4 * self.theta.nbytes + (0 if self.start is None else self.start.nbytes)

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return self.theta.numel()

    @torch.no_grad()
    def write(self) -> None:
        """Put the value, rounded as it is stored, into the model."""
        exact = self.theta
        if self.start is not None:
            exact = self.start.float() * self.theta.exp()
        self.parameter.copy_(exact.to(self.dtype))

    @torch.no_grad()
    def take_gradient(self) -> Tensor:
        """Turn the parameter's gradient into that of what Adam moves, and return it."""
        gradient = self.parameter.grad
        if gradient is None:  # a layer that no token reached
            gradient = torch.zeros_like(self.parameter)
        self.parameter.grad = None
        if self.start is not None:
            gradient = gradient.mul_(self.parameter)
        self.theta.grad = gradient
        return gradient

    def stored(self) -> Tensor:
        """Return the value as the checkpoint has it."""
        return self.parameter.detach().expand(self.shape).to(self.dtype).contiguous()


def adam(parameters: Sequence[StoredParameter], learning_rate: float) -> torch.optim.Adam:
    """Return Adam over trained tensors, each with steps relative to its unit."""
    groups = [
        {"params": [part.theta.requires_grad_()], "lr": learning_rate * part.unit}
        for part in parameters
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
