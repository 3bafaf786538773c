"""Layers like those of a trained transformer, to compare rounding methods without a model."""

from __future__ import annotations

import torch
from torch import Tensor


def make_layer(m: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a weight (m, d) and a Hessian (d, d) of 8 d tokens.

    Inputs are heavy-tailed (Student's t, 4 degrees of freedom) with a spectrum i^-0.9 in a random
    basis, channel scales and means, and 1 % of channels times 20; weights are heavy-tailed with row
    and column scales.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = 8 * d

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    basis, _ = torch.linalg.qr(normal(d, d))
    spectrum = torch.arange(1, d + 1) ** -0.9
    t4 = torch.stack([normal(tokens, d).square() for _ in range(4)]).mean(0).rsqrt()
    X = (normal(tokens, d) * t4 * spectrum.sqrt()) @ basis.T
    X = X / X.std(0)
    X = X * torch.exp(0.5 * normal(d)) + 0.3 * normal(d)
    outliers = torch.randperm(d, generator=g)[: max(1, d // 100)]
    X[:, outliers] *= 20
    H = X.T @ X / (tokens / 256)
    tails = torch.stack([normal(m, d).square() for _ in range(6)]).mean(0).rsqrt()
    W = 0.02 * normal(m, d) * tails
    W = W * torch.exp(0.25 * normal(m, 1)) * torch.exp(0.15 * normal(1, d))
    return W, H
