"""The reference of a loss with `+kl`: another model, or the same one without its adapters.

It is asked for its hidden states only; its logits exist a few rows at a time, where the divergence
is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rlo_core.errors import RLOError
from rlo_core.linear.divergence import Layer
from rlo_core.terms import KL, kl_rows
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from rlo_hf.conventions import matched
from rlo_hf.head import Head, HeadError, autocast_pair, replaced, separate
from rlo_hf.objective import IGNORE_INDEX, Objective
from rlo_hf.tasks import base_of, virtual_tokens

_ROWS = 256


class Reference:
    """A causal language model that stays as it is.

    Args:
        objective: The loss with its terms.
        model: The reference; None for the trained model with its adapters turned off.
        host: The trainer.

    Raises:
        RLOError: no reference, or one for a loss without a term.
    """

    def __init__(self, objective: Objective, model: Any, host: Any) -> None:
        self.objective, self.model = objective, model
        self._head: Head | None = None
        if not objective.terms:
            raise RLOError(
                f"reference_model is for a loss with '+kl', got {objective.name!r}; for example "
                f"'{objective.name}+kl:beta=0.1'"
            )
        if model is None:
            trained = unwrap_model(host.model)
            if not hasattr(trained, "disable_adapter") or virtual_tokens(host.model):
                raise RLOError(
                    f"loss {objective.name!r} needs a reference: give reference_model=, or train "
                    "LoRA adapters, whose model without them is the reference"
                )
        else:
            both: tuple[Any, Any] = (model, base_of(host.model))
            sizes = [m.get_output_embeddings().weight.shape[0] for m in both]
            if sizes[0] != sizes[1]:
                raise RLOError(
                    f"the reference must have the vocabulary of the model, {sizes[1]} tokens, got "
                    f"{sizes[0]}"
                )
            model.to(host.args.device)

    @contextmanager
    def standing(self, trained: nn.Module) -> Iterator[nn.Module]:
        """Give the reference, in evaluation mode and without gradients, for the block."""
        if self.model is not None:
            self.model.eval()
            with torch.no_grad():
                yield self.model
            return
        wrapped: Any = unwrap_model(trained)
        modes = [(module, module.training) for module in wrapped.modules()]
        try:
            wrapped.eval()
            with torch.no_grad(), wrapped.disable_adapter():
                yield wrapped
        finally:
            for module, training in modes:
                module.training = training

    def layer(self, trained: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Layer:
        """Return the reference's hidden states at the kept labels, and its output layer.

        Args:
            trained: The model that is trained, with its wrappers.
            inputs: The batch.
            target: Labels in the places of the predictions, (B, T), -100 ignored.
        """
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden.new_zeros((*hidden.shape[:-1], 1))

        rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items")}
        with self.standing(trained) as reference:
            base = base_of(reference)
            if self._head is None:
                try:
                    self._head = separate(base)
                except HeadError as error:
                    raise RLOError(
                        f"the reference cannot be used without logits: {error}"
                    ) from error
            head = self._head
            with replaced(head.linear, keep):
                base(**rest)
            hidden = matched(seen[0], target, "causal")
            kept = (target != IGNORE_INDEX).to(hidden.device)
            states, weight, bias = autocast_pair(hidden[kept] * head.scale, head.linear)
        return states, weight.detach(), None if bias is None else bias.detach(), head.softcap


def term_total(
    terms: Sequence[KL], logits: Callable[[int, int], Tensor], layer: Layer, weights: Tensor | None
) -> Tensor:
    """Return the terms summed over the kept labels, from logits.

    Args:
        terms: Of the loss.
        logits: Gives rows `start` to `stop` of the kept labels' logits.
        layer: Of the reference.
        weights: Of the kept labels, or None.
    """
    states, weight, bias, softcap = layer
    total = torch.zeros((), device=states.device)
    for start in range(0, len(states), _ROWS):
        at = slice(start, start + _ROWS)
        other = torch.nn.functional.linear(states[at], weight, bias)
        if softcap is not None:
            other = (other.float() / softcap).tanh() * softcap
        own = logits(start, min(start + _ROWS, len(states)))
        for term in terms:
            rows = term.scale * kl_rows(own, other, temperature=term.temperature)
            total = total + (rows if weights is None else rows * weights[at].to(rows)).sum()
    return total
