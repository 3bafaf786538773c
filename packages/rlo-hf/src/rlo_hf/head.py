"""The output layer of a causal language model, taken out so that logits are never materialised.

For one forward call the layer's `forward` is replaced on that instance: it is given the hidden
states and the loss is computed from them and the layer's weight. The rest of the model, and every
wrapper around it (DDP, PEFT, accelerate), runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rlo_core.errors import RLOError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlo_hf._compat import has_hooks

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Where models keep the factor of their logits; `logits_scaling` divides in some and multiplies in
others. Which one a model applies is measured, not looked up."""


class HeadError(RLOError):
    """The reason why a model's output layer cannot be separated."""


@dataclass(frozen=True)
class Head:
    """An output layer and what the model does to its result.

    Args:
        linear: The layer.
        scale: The model multiplies the logits by it.
        softcap: The model maps the logits to softcap * tanh(logits / softcap) after that, or None.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


@torch.no_grad()
def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """Return what the model makes of the hidden states, in the layer's own dtype."""
    states, weight, bias = autocast_pair(hidden * head.scale, head.linear)
    logits = nn.functional.linear(states, weight, bias)
    if head.softcap is None:
        return logits
    return (logits.float() / head.softcap).tanh() * head.softcap


@contextmanager
def replaced(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `linear(hidden)` be `forward(hidden)` inside the block."""
    linear.__dict__["forward"] = forward
    try:
        yield
    finally:
        del linear.__dict__["forward"]


def separate(model: nn.Module) -> Head:
    """Find the output layer of a causal LM and measure what is done to its result.

    Known numbers are put in the place of the layer's output, and what the model returns for them
    shows every scaling and capping.

    Args:
        model: The transformers model, without wrappers, with its weights in memory.

    Raises:
        HeadError: the layer is no plain linear one, or the model does something else to its result.
    """
    getter = getattr(model, "get_output_embeddings", None)
    linear = getter() if getter is not None else None
    if type(linear) is not nn.Linear:
        raise HeadError(f"its output layer is {type(linear).__name__}, not a plain nn.Linear")
    if has_hooks(linear):
        raise HeadError("its output layer has hooks")
    # FSDP2 has a DTensor there; the whole weight comes back while its module's forward runs.
    if linear.weight.is_meta or type(linear.weight.data) not in (Tensor, DTensor):
        raise HeadError(f"its output weight is a {type(linear.weight.data).__name__} or on meta")
    config: Any = model.config
    text = config.get_text_config()
    seen, values = _post_head(model, linear)
    cap = getattr(text, "final_logit_softcapping", None)
    for scale in _candidates(text):
        for softcap in (None, cap) if cap else (None,):
            expected = values * scale
            if softcap is not None:
                expected = softcap * torch.tanh(expected / softcap)
            tolerance = 1e-5 if seen.dtype == torch.float32 else 2e-2
            if torch.allclose(seen.float(), expected, rtol=tolerance, atol=tolerance):
                if scale != 1.0 and linear.bias is not None:
                    raise HeadError("its logits are scaled after a bias")
                return Head(linear, scale, softcap)
    raise HeadError("its logits are changed after the output layer in a way that is not known")


def _candidates(text: Any) -> list[float]:
    found = [1.0]
    for name in _SCALES:
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and value:
            found += [float(value), 1.0 / value]
    return found


def _post_head(model: nn.Module, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the logits of four tokens, and the numbers that were in the output layer's place."""
    shapes: list[tuple[int, ...]] = []
    device = linear.weight.device
    size = 4 * linear.out_features
    # +-40 is past any soft cap in use (30, 50), and short of where tanh is flat.
    values = torch.linspace(-40.0, 40.0, size, device=device).view(1, 4, -1)
    values = values.to(linear.weight.dtype).float()

    def known(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape))
        return values.to(linear.weight.dtype)

    modes = [(module, module.training) for module in model.modules()]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(4, device=embedding.weight.device).unsqueeze(0)
    try:
        model.eval()
        with torch.no_grad(), replaced(linear, known):
            output = model(input_ids=ids)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise HeadError(f"it cannot be tried on four tokens ({error})") from error
    finally:
        # Under autocast the casts made here have no gradient, and older torch would reuse them in
        # the training step: weights would stay as they are without a word.
        torch.clear_autocast_cache()
        for module, training in modes:
            module.training = training
    if shapes != [(1, 4, linear.in_features)]:
        raise HeadError(f"its output layer was called with shapes {shapes}")
    if output.logits.shape != values.shape:
        raise HeadError(f"its logits have shape {tuple(output.logits.shape)}")
    return output.logits, values


def autocast_pair(hidden: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, weight and bias in the dtype in which `linear` would have run."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = linear.weight.dtype
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return hidden.to(dtype), linear.weight.to(dtype), bias
