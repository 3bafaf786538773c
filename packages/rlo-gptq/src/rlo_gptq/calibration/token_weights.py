r"""How much each calibration token counts: the slope of a loss at the model's own cross entropy.

A plain Hessian treats all tokens alike. With `--hessian rlo:k=5` token t weighs
:math:`\text{link}'(ce_t)`, what a gradient step of that loss would give it: the bounded form takes
tokens that the model has lost anyway out of the average, the convex form looks at them first. With
energy, the weight is the squared norm of the loss's gradient at the last hidden state,
:math:`\|\text{link}'(ce_t)\, \partial ce_t / \partial h_t\|^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rlo_core.errors import SpecError
from rlo_core.links import Link
from rlo_core.registry import create_loss, link_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlo_gptq.calibration.hessian_sum import CalibrationError


def weighting_link(spec: str) -> Link:
    """Return the link of a loss spec, by whose slope tokens are weighted.

    Raises:
        SpecError: the spec is wrong, or its loss has no link.
    """
    link = link_of(create_loss(spec))
    if link is None:
        raise SpecError(f"loss {spec!r} has no link, so tokens cannot be weighted by its slope")
    return link


def sequence_weights(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    sequence: Tensor,
    link: Link,
    *,
    energy: bool,
) -> Tensor:
    """Return the weight of each token of one sequence.

    Token t is weighted by the loss of predicting token t + 1 from it; the last token, which
    predicts nothing, by the mean of the others.

    Args:
        logits_of: The model from its last block's output on: (1, tokens, width) -> (1, tokens, C).
        hidden: The last block's output, (1, tokens, width).
        sequence: Token ids, (tokens,).
        link: Of the loss.
        energy: Weight by the squared gradient at `hidden` instead of by the slope.

    Returns:
        (tokens,), float32, at least 0.

    Raises:
        CalibrationError: the model's logits are not finite.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(energy)
        logits = logits_of(leaf)[0, :-1].float()
        ce = F.cross_entropy(logits, sequence[1:].to(logits.device), reduction="none")
        if not bool(torch.isfinite(ce).all()):
            raise CalibrationError("logits of the calibration text must be finite, got NaN or inf")
        slope = link.slope(ce.detach())
        if energy:
            # Causal: position t of the hidden states reaches prediction t alone from here on.
            (gradient,) = torch.autograd.grad((ce * slope).sum(), leaf)
            weights = gradient[0, :-1].float().square().sum(-1)
        else:
            weights = slope
    return torch.cat([weights, weights.mean(0, keepdim=True)]).detach()


@contextmanager
def logits_from_hidden(
    model: PreTrainedModel, blocks: Sequence[nn.Module]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the function from the last block's output to the logits; blocks need no weights.

    Args:
        model: With the weights outside of its blocks in place.
        blocks: Its decoder blocks.
    """
    current: list[Tensor] = []
    as_tuple = [False]

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return (current[0],) if as_tuple[0] else current[0]

    def logits_of(hidden: Tensor) -> Tensor:
        current[:] = [hidden]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        for form in (as_tuple[0], not as_tuple[0]):  # some models take output[0] of a block
            as_tuple[0] = form
            try:
                logits: Tensor = model(input_ids=ids, use_cache=False).logits
            except (IndexError, TypeError, AttributeError, ValueError):
                continue
            if logits.shape[:2] == hidden.shape[:2]:
                return logits
        raise CalibrationError(f"model {type(model).__name__} must map hidden states to logits")

    for block in blocks:
        block.forward = pass_on
    try:
        yield logits_of
    finally:
        for block in blocks:
            del block.forward
