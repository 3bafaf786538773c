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
from rlo_core.linear import (
    gated_linear_cross_entropy,
    linear_kl_divergence,
    linear_log_probs,
)
from rlo_core.linear.divergence import Layer
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlo_hf.objective import Objective
from rlo_hf.reference import term_total
from rlo_hf.self_check import reference_total

_KERNEL, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"


def reason_against(args: Any, *, gathers: bool = False) -> str | None:
    """Return why TRL's own kernel stays, or None where ours can take its place.

    Args:
        args: Of the trainer.
        gathers: Whether ours would need the layer's weight again in the backward pass.
    """
    if getattr(args, "torch_compile", False):
        return "torch_compile is on"
    if not (hasattr(trl_utils, _KERNEL) and hasattr(trl_utils, _COMPACT)):
        return "this version of TRL computes its output layer in another way"
    if gathers and is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return "ZeRO-3 gathers the layer for TRL's kernel only"
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


def _as_the_model_does(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
    """Return states, weight and bias whose product, capped, is the model's logits by temperature.

    The model scales and caps after the bias: (h W + b) s is (s h) W + s b, and c tanh(z / c) / t is
    (c/t) tanh((z/t) / (c/t)).
    """
    kind, dtype, scale = hidden.device.type, hidden.dtype, scale / temperature
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if bias is not None:
        bias = (bias if scale == 1.0 else bias * scale).to(dtype)
    states = (hidden if scale == 1.0 else hidden * scale).to(dtype)
    return states, weight.to(dtype), bias, None if softcap is None else softcap / temperature


def log_prob_kernel(
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
    """Return what TRL's kernel does, for its preference and policy trainers.

    Log-probabilities, entropy, log of the sum of squared probabilities, mean logit, and whether the
    label is the first of the largest; the entropy comes without gradient.
    """
    states, weight, bias, softcap = _as_the_model_does(
        hidden, weight, bias, temperature, softcap, scale
    )
    wanted = [ours for theirs, ours in _STATISTICS.items() if theirs in outputs]
    log_probs, rows = linear_log_probs(
        states, weight, target, bias=bias, softcap=softcap, statistics=wanted
    )
    squares = None if rows.sum_sq is None else rows.sum_sq.log()
    correct = None if rows.correct is None else rows.correct.bool()
    return log_probs, rows.entropy, squares, rows.mean_logit, correct


def layer_of(call: Callable[[], Any]) -> Layer:
    """Return the states of the labelled tokens and the layer that TRL's head is given in a call."""
    found: list[Layer] = []

    def keep(hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, *rest: Any) -> Any:
        temperature, _, softcap, scale, _ = rest
        states, weight, bias, softcap = _as_the_model_does(
            hidden, weight, bias, temperature, softcap, scale
        )
        found.append((states, weight.detach(), None if bias is None else bias.detach(), softcap))
        return (hidden.new_zeros(len(target)), None, None, None, None)

    with kernel(keep):
        call()
    return found[0]


_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq",
    "mean_logits": "mean_logit",
    "is_top1": "correct",
}
"""What TRL calls the numbers of a row, and what we do."""


class HeadStep:
    """One step of the output layer.

    Args:
        objective: The loss; it has a link.
        weights: The weight of each label that is not ignored, in order, or None.
        training: Whether the loss or the log-probabilities are wanted.
        check: Whether the loss is computed once more, by the formula.
        anchor: The reference's states at the labels and its layer, for terms of the loss.

    Attributes:
        total: The loss summed over the labels, in training.
        rows: The statistics of the labels, in order.
        expected: With `check`, what `total` should be.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Tensor | None,
        *,
        training: bool,
        check: bool = False,
        anchor: Layer | None = None,
    ) -> None:
        self.objective, self.weights, self.anchor = objective, weights, anchor
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
        states, weight, bias, softcap = _as_the_model_does(
            hidden, weight, bias, temperature, softcap, scale
        )
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
        if self.anchor is not None:
            for term in self.objective.terms:
                total = total + term.scale * linear_kl_divergence(
                    states,
                    weight,
                    self.anchor,
                    bias=bias,
                    softcap=softcap,
                    temperature=term.temperature,
                    token_weight=self.weights,
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

        total = reference_total(self.objective, logits, target, self.weights)
        if self.anchor is None:
            return total
        return total + term_total(self.objective.terms, logits, self.anchor, self.weights)
