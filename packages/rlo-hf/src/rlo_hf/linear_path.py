"""Which way the loss of a causal language model is computed: from logits, or without them.

Without them the output layer is given the loss's work for one forward call (see `rlo_hf.head`),
and what the model returns in the place of its logits is one number wide.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from rlo_core.errors import RLOError
from rlo_core.linear.divergence import Layer
from torch import Tensor, nn
from transformers.utils import logging

from rlo_hf.conventions import matched
from rlo_hf.head import Head, HeadError, autocast_pair, replaced, separate
from rlo_hf.objective import IGNORE_INDEX, Objective
from rlo_hf.tasks import Task

logger = logging.get_logger(__name__)
Linear = Literal["auto", "fused", "off"]


class LinearPath:
    """The path, decided at the first training batch and said once.

    Args:
        wanted: "auto", "fused" (raise where it is not possible) or "off".
        objective: The loss.
        task: Of the model; only "causal" has a fused path.

    Attributes:
        name: "fused" or "logits (REASON)"; empty until it is decided.
        total: The loss summed over the labels of the last fused call; None on the other path.
        seen: With `keep`, the head and the hidden states of the last fused call.
        keep: Whether to keep them, for the check of the first batch.

    Raises:
        ValueError: `wanted` is none of the three.
    """

    def __init__(self, wanted: Linear, objective: Objective, task: Task) -> None:
        if wanted not in ("auto", "fused", "off"):
            raise ValueError(f"linear must be 'auto', 'fused' or 'off', got {wanted!r}")
        self.wanted, self.objective, self.task = wanted, objective, task
        self.name = ""
        self.total: Tensor | None = None
        self.keep = False
        self.seen: tuple[Head, Tensor] | None = None
        self._head: Head | None = None
        self._call: tuple[Tensor, Tensor | None, Layer | None] | None = None
        # One function for all calls: a compiled model would be compiled anew for another one.
        self._forward = torch.compiler.disable(self._in_place_of_logits)  # type: ignore[no-untyped-call]
        self._base: weakref.ref[nn.Module] | None = None

    def decide(self, base: nn.Module, host: Any) -> None:
        """Choose the path for a model, once for each model (`model_init` makes new ones).

        Args:
            base: The transformers model, without wrappers.
            host: The Trainer.

        Raises:
            RLOError: "fused" is asked for and not possible; the message has the reason.
        """
        if self._base is not None and self._base() is base:
            return
        self._base, self._head = weakref.ref(base), None
        reason = self._reason_against(host)
        if reason is None:
            try:
                self._head = separate(base)
            except HeadError as error:
                reason = str(error)
        if reason is not None and self.wanted == "fused":
            raise RLOError(f"linear='fused' is not possible for {type(base).__name__}: {reason}")
        self.name = "fused" if reason is None else f"logits ({reason})"
        if host.is_world_process_zero():
            logger.warning(f"loss {self.objective.name}, linear path: {self.name}")

    def _reason_against(self, host: Any) -> str | None:
        if self.wanted == "off":
            return "linear='off'"
        if self.task != "causal":
            return f"the task is {self.task}, not causal"
        if self.objective.link is None:
            return "the loss has no link"
        if self.objective.weight is not None:
            return "the loss has class weights"
        if host.is_deepspeed_enabled:
            return "DeepSpeed shards the output weight"
        if host.is_fsdp_enabled and not host.accelerator.is_fsdp2:
            return "FSDP 1 keeps the output weight in a flat parameter"
        return None

    @contextmanager
    def taken(
        self, target: Tensor, weights: Tensor | None = None, anchor: Layer | None = None
    ) -> Iterator[None]:
        """Let a forward call inside the block leave its loss in `total`, if the path is fused.

        Args:
            target: Labels in the places of the predictions, (B, T), -100 ignored.
            weights: Their weights, (B, T), or None.
            anchor: The reference's states at the kept labels and its layer, for terms of the loss.
        """
        self.total = None
        head = self._head
        if head is None:
            yield
            return

        self._call = (target, weights, anchor)
        try:
            with replaced(head.linear, self._forward):
                yield
        finally:
            self._call = None

    def _in_place_of_logits(self, hidden: Tensor) -> Tensor:
        """What the output layer does in a fused call."""
        assert self._head is not None
        assert self._call is not None
        self.total = self._total(self._head, hidden, *self._call)
        self.seen = (self._head, hidden.detach()) if self.keep else None
        # DDP finds the parameters that were used through the outputs.
        return self.total.expand(*hidden.shape[:2], 1).clone()

    def _total(
        self,
        head: Head,
        hidden: Tensor,
        target: Tensor,
        weights: Tensor | None,
        anchor: Layer | None,
    ) -> Tensor:
        own = self._own_total(head, hidden, target, weights)
        if anchor is None:
            return own
        from rlo_core.linear import linear_kl_divergence

        hidden = matched(hidden, target, self.task)
        kept = (target != IGNORE_INDEX).to(hidden.device)
        states, weight, bias = autocast_pair(hidden[kept] * head.scale, head.linear)
        share = None if weights is None else weights.to(hidden.device)[kept]
        for term in self.objective.terms:
            own = own + term.scale * linear_kl_divergence(
                states,
                weight,
                anchor,
                bias=bias,
                softcap=head.softcap,
                temperature=term.temperature,
                token_weight=share,
            )
        return own

    def _own_total(
        self, head: Head, hidden: Tensor, target: Tensor, weights: Tensor | None
    ) -> Tensor:
        from rlo_core.linear import gated_linear_cross_entropy, link_linear_cross_entropy

        link = self.objective.link
        assert link is not None
        hidden = matched(hidden, target, self.task)
        states, weight, bias = autocast_pair(hidden * head.scale, head.linear)
        share = None if weights is None else weights.to(hidden.device).flatten()
        if self.objective.gates:
            total, _ = gated_linear_cross_entropy(
                states.flatten(0, -2),
                weight,
                target.to(hidden.device).flatten(),
                link,
                self.objective.gates,
                bias=bias,
                token_weight=share,
                softcap=head.softcap,
            )
            return total
        return link_linear_cross_entropy(
            states.flatten(0, -2),
            weight,
            target.to(hidden.device).flatten(),
            link,
            bias=bias,
            label_smoothing=self.objective.label_smoothing,
            token_weight=share,
            softcap=head.softcap,
            reduction="sum",
        )
