"""TRL's fused output layer, computed by ours: one loss, and numbers of each token, in one pass.

TRL's trainers call their model with `fused_lm_head=True`, and that hands the hidden states of the
labelled tokens, the layer's weight and the labels to one function for log-probabilities, entropy
and top-1. For the time of a step ours is in its place. In training it sums the objective with the
gradients ready, where TRL's computes every logit again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from rlo_core.gates import RowStatistics, gate_factor
from rlo_core.linear import gated_linear_cross_entropy
from torch import Tensor

from rlo_hf.objective import Objective
from rlo_hf.self_check import reference_total

_KERNEL, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"


def reason_against(args: Any) -> str | None:
    """Return why TRL's own kernel stays, or None where ours can take its place."""
    if getattr(args, "torch_compile", False):
        return "torch_compile is on"
    if not (hasattr(trl_utils, _KERNEL) and hasattr(trl_utils, _COMPACT)):
        return "this version of TRL computes its output layer in another way"
    return None


@contextmanager
def kernel(apply: Callable[..., Any]) -> Iterator[None]:
    """Let `apply` compute TRL's output layer inside the block, on the labelled tokens only."""
    names: Any = vars(trl_utils)
    before = names[_KERNEL], names[_COMPACT]
    names[_KERNEL], names[_COMPACT] = SimpleNamespace(apply=apply), lambda device: True
    try:
        yield
    finally:
        names[_KERNEL], names[_COMPACT] = before


class HeadStep:
    """One step of the output layer.

    Args:
        objective: The loss; it has a link.
        weights: The weight of each label that is not ignored, in order, or None.
        training: Whether the loss or the log-probabilities are wanted.
        check: Whether the loss is computed once more, by the formula.

    Attributes:
        total: The loss summed over the labels, in training.
        rows: The statistics of the labels, in order.
        expected: With `check`, what `total` should be.
    """

    def __init__(
        self, objective: Objective, weights: Tensor | None, *, training: bool, check: bool = False
    ) -> None:
        self.objective, self.weights = objective, weights
        self.training, self.check = training, check
        self.total: Tensor | None = None
        self.rows: RowStatistics | None = None
        self.expected: Tensor | None = None

    def losses(self) -> Tensor:
        """Return the objective of each label, in order, without gradient."""
        rows, link = self.rows, self.objective.link
        assert rows is not None
        assert link is not None
        return link.value(rows.ce) * gate_factor(self.objective.gates, rows)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return what TRL's kernel does: log-probabilities, entropy, two that are None, top-1.

        In training each log-probability is the mean of the negative objective instead: TRL sums
        them, and the sum has the objective's value and gradient.
        """
        kind = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        # The model scales and caps after the bias: (h W + b) s is (s h) W + s b.
        states = (hidden * (scale / temperature if softcap is None else scale)).to(dtype)
        if bias is not None and scale != 1.0:
            bias = bias * scale
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        link = self.objective.link
        assert link is not None
        total, rows = gated_linear_cross_entropy(
            states,
            weight,
            target,
            link,
            self.objective.gates,
            bias=bias,
            token_weight=self.weights,
            softcap=softcap,
            statistics=("entropy", "correct"),
        )
        self.rows, self.total = rows, total
        if self.check:
            self.expected = self._again(states, weight, bias, target, softcap)
        if self.training:
            log_probs = -(total / max(len(target), 1)).expand(len(target))
        else:
            log_probs = -rows.ce
        correct = None if rows.correct is None else rows.correct.bool()
        return log_probs, rows.entropy, None, None, correct

    @torch.no_grad()
    def _again(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        softcap: float | None,
    ) -> Tensor:
        def logits(start: int, stop: int) -> Tensor:
            part = torch.nn.functional.linear(states[start:stop], weight, bias)
            return part if softcap is None else (part.float() / softcap).tanh() * softcap

        return reference_total(self.objective, logits, target, self.weights)
