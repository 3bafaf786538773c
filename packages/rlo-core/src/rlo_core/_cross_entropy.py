"""Autograd functions of the losses: a link with its closed-form slope, and cross entropy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from rlo_core._compat import forward_mode_enabled
from rlo_core.links import CE, Link


@contextmanager
def _differentiable_again(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Let an outer forward-mode derivative see what a `jvp` computes.

    torch calls a `jvp` with forward mode off, for all levels: the second of two nested derivatives
    would be a silent zero. With it on, what was saved has to give up its tangent of this level,
    which `jvp` is handed as an argument; its tangents of outer levels stay.
    """
    with forward_mode_enabled():
        unpack: Any = forward_ad.unpack_dual  # which has no types
        yield tuple(unpack(tensor, level=0).primal for tensor in saved)


class _ApplyLink(torch.autograd.Function):
    """link(ce) whose gradient is the closed-form slope.

    Autograd's own derivative of expm1 is `result + 1`, which is 0 in float32 once ce/k > 17.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(ce: Tensor, link: Link) -> Tensor:
        value = link.value(ce)
        # An input returned as it is may not be saved for backward: autograd wants a view of it.
        return value.view_as(value) if value is ce else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Link], output: Tensor) -> None:
        ce, ctx.link = inputs
        ctx.save_for_backward(ce)
        ctx.save_for_forward(ce)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ce,) = ctx.saved_tensors
        return grad * ctx.link.slope(ce), None


class _ApplyLinkEager(_ApplyLink):
    """The same with a forward-mode derivative, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        with _differentiable_again(*ctx.saved_tensors) as (ce,):
            slope: Tensor = ctx.link.slope(ce)
            return tangent * slope


def apply_link(ce: Tensor, link: Link) -> Tensor:
    """Return `link.value(ce)`, differentiated by `link.slope`, computed in float32 or wider.

    Args:
        ce: Per-sample cross entropy, any shape, nats, >= 0.
        link: Any `rlo_core.links.Link`.

    Returns:
        The loss of each sample, the shape of `ce`, float32 or wider.
    """
    if ce.dtype in (torch.float16, torch.bfloat16):
        ce = ce.float()
    if isinstance(link, CE):
        return ce
    function = _ApplyLink if torch.compiler.is_compiling() else _ApplyLinkEager
    applied: Tensor = function.apply(ce, link)
    return applied


class CrossEntropy(torch.autograd.Function):
    """Per-sample cross entropy, classes last, every label valid; for torch.compile.

    Keeps the logits instead of float32 log-probabilities, and its gradient p - y is one pass over
    them, where that of log_softmax and nll_loss first sums a row of zeros with one entry.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1, dtype=wide_dtype(logits))
        return -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        p = F.softmax(logits, dim=-1, dtype=wide_dtype(logits))
        # A comparison, which inductor fuses; a scatter would make it hold all of p in float32.
        classes = torch.arange(logits.shape[-1], device=logits.device)
        one_hot = (classes == target.unsqueeze(-1)).to(p.dtype)
        return ((p - one_hot) * grad.unsqueeze(-1)).to(logits.dtype), None


class HalfCrossEntropy(CrossEntropy):
    """The same, eager, for half-precision logits: the value keeps float32's digits.

    The peak is no higher than that of torch's own half-precision cross entropy.
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        p = F.softmax(logits, dim=-1, dtype=torch.float32)
        index = target.unsqueeze(-1)
        minus_one = torch.full_like(index, -1, dtype=torch.float32)
        if torch.is_grad_enabled():  # a second derivative is being recorded
            return (p.scatter_add(-1, index, minus_one) * grad.unsqueeze(-1)).to(logits.dtype), None
        return p.scatter_add_(-1, index, minus_one).mul_(grad.unsqueeze(-1)).to(logits.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # torch.compile cannot trace one
        with _differentiable_again(*ctx.saved_tensors) as (logits, target):
            tangent = tangent.float()
            mean = (F.softmax(logits, dim=-1, dtype=torch.float32) * tangent).sum(-1)
            return mean - tangent.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
