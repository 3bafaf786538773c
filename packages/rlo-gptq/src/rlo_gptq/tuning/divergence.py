r"""The KL divergence of a model's next-token distribution to one of which the top k are known.

With p the dense model's probabilities of its k likeliest tokens and :math:`p_0` the rest of them
together, q the packed model's probabilities and :math:`q_0` what it gives to all other tokens:

.. math:: KL = \sum_{i \le k} p_i \log (p_i / q_i) + p_0 \log (p_0 / q_0).

That is the divergence of two distributions over k + 1 events: at most the whole one, and equal to
it where q is right in its proportions among the rare tokens. Its gradient by a logit is
:math:`q_j - p_j` among the k and :math:`q_j (1 - p_0 / q_0)` elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 24
"""Logits that exist at one time: 64 MB, 341 tokens at a vocabulary of 49,152."""

_SMALLEST = 1e-30
"""Probabilities below are taken as this, so that a logarithm stays finite."""


def logit_rows(vocabulary: int) -> int:
    """Return the number of tokens whose logits may exist at one time."""
    return max(16, LOGITS // vocabulary)


@dataclass(frozen=True)
class Target:
    """What is known of the dense model's distribution at each token.

    Args:
        tokens: (n, k), int64, the likeliest next tokens.
        probabilities: (n, k), float32, theirs.
        rest: (n,), float32, of all the others together.
        ce: (n,), float32, the dense model's cross entropy for the true next token, in nats.
    """

    tokens: Tensor
    probabilities: Tensor
    rest: Tensor
    ce: Tensor

    def rows(self, part: slice) -> Target:
        """Return some of the tokens."""
        return Target(self.tokens[part], self.probabilities[part], self.rest[part], self.ce[part])

    def to(self, device: torch.device) -> Target:
        """Return it on a device."""
        return Target(
            self.tokens.to(device),
            self.probabilities.to(device),
            self.rest.to(device),
            self.ce.to(device),
        )


def known_part(logits: Tensor, following: Tensor, k: int) -> Target:
    """Return the top k of a distribution, and its cross entropy for the tokens that follow.

    Args:
        logits: (n, V), floating.
        following: (n,), int64, the true next tokens.
        k: At most V - 1 are kept, so that there is a rest.
    """
    wide = logits.float()
    k = min(k, wide.shape[1] - 1)
    q = wide.softmax(-1)
    top = q.topk(k)
    rest = q.scatter_(1, top.indices, 0.0).sum(-1)
    return Target(top.indices, top.values, rest, F.cross_entropy(wide, following, reduction="none"))


class _Divergence(torch.autograd.Function):
    """The gradient is finished in the forward pass, in the tile that the probabilities were in."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, probabilities: Tensor, rest: Tensor
    ) -> Tensor:
        tile = torch.softmax(logits, -1, dtype=torch.float32)
        q = tile.gather(1, tokens)
        tile.scatter_(1, tokens, 0.0)
        q_rest = tile.sum(-1)
        log_ratio = probabilities.clamp(min=_SMALLEST).log() - q.clamp(min=_SMALLEST).log()
        kl = (probabilities * log_ratio).sum(-1)
        log_rest = rest.clamp(min=_SMALLEST).log() - q_rest.clamp(min=_SMALLEST).log()
        kl += rest * log_rest
        if ctx.needs_input_grad[0]:
            tile.mul_((1 - rest / q_rest.clamp(min=_SMALLEST)).unsqueeze(1))
            ctx.tile = tile.scatter_(1, tokens, q - probabilities)
            ctx.dtype = logits.dtype
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        tile: Tensor = ctx.tile
        return tile.mul_(grads[0].unsqueeze(1)).to(ctx.dtype), None, None, None


def divergence(logits: Tensor, target: Target) -> Tensor:
    r"""Return the KL divergence at each token, (n,), float32, in nats.

    Args:
        logits: (n, V) of the packed model, floating.
        target: Of n tokens.

    Source: the formula above; QuIP# and PV-tuning take the whole distribution.
    """
    result: Tensor = _Divergence.apply(logits, target.tokens, target.probabilities, target.rest)
    return result
