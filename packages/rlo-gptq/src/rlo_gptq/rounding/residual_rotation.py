r"""The rotation Q of a model's residual stream, which is folded into its weights.

RMSNorm commutes with any orthogonal Q. LayerNorm takes the mean off, and only commutes with a Q
that fixes the vector of ones; `MeanRotation` is one: :math:`Q = T^T D T`, T orthogonal with a
constant first row and D random signs with :math:`D_0 = 1`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from rlo_gptq.rounding.random_streams import random_signs
from rlo_gptq.rounding.rotation import Rotation, hadamard_matrix

_RESIDUAL_STREAM = 64  # apart from the streams of the layers' own rotations


class ResidualRotation(Protocol):
    """An orthogonal map Q of vectors along the last axis."""

    def apply(self, x: Tensor) -> Tensor:
        """Return Q x."""

    def apply_T(self, x: Tensor) -> Tensor:  # noqa: N802
        """Return Q^T x."""


class MeanRotation:
    """An orthogonal map of n coordinates that keeps the mean: Q 1 = 1.

    Args:
        n: Width, any positive integer.
        seed: Of the generator.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.power = n & -n
        odd = n // self.power
        self.hadamard = hadamard_matrix(self.power)
        index = torch.arange(odd, dtype=torch.float64)
        # The orthonormal cosine transform (DCT-II): its first row is constant.
        cosine = torch.cos(math.pi / odd * (index[None, :] + 0.5) * index[:, None])
        cosine *= math.sqrt(2.0 / odd)
        cosine[0] = 1.0 / math.sqrt(odd)
        self.cosine = cosine
        self.signs = random_signs(seed, _RESIDUAL_STREAM, n).double()
        self.signs[0] = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """Return Q x along the last axis, float64."""
        shape, device = x.shape, x.device
        cosine, hadamard = self.cosine.to(device), self.hadamard.to(device)
        grid = x.double().reshape(-1, self.n // self.power, self.power)
        spectrum = cosine @ grid @ hadamard.T
        signed = spectrum * self.signs.to(device).view(1, -1, self.power)
        return (cosine.T @ signed @ hadamard).reshape(shape)

    def apply_T(self, x: Tensor) -> Tensor:  # noqa: N802
        """Return Q^T x, which is Q x: the map is its own inverse."""
        return self.apply(x)


def residual_rotation(kind: str, width: int, seed: int) -> ResidualRotation:
    """Return the rotation of a residual stream.

    Args:
        kind: `hadamard`, or `mean` for norms that take the mean off.
        width: Of the stream.
        seed: Of the generator.

    Raises:
        ValueError: the kind is another one.
    """
    if kind == "mean":
        return MeanRotation(width, seed)
    if kind != "hadamard":
        raise ValueError(f"kind must be 'hadamard' or 'mean', got {kind!r}")
    return Rotation("hadamard", width, seed, stream=_RESIDUAL_STREAM)
