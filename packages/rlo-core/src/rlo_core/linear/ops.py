"""The chunk loop as differentiable functions, for eager calls and for torch.compile.

`loss_sum` has its gradients ready when it returns; `loss_rows` computes the logits again in its
backward pass, where the weight of each token becomes known, by chunks of tokens or in the second of
two passes over blocks of classes. Both exist twice over the same code: as
an autograd function, and as an operator of torch's dispatcher that torch.compile keeps whole. An
eager call does not go through the operator, because its first call imports torch._dynamo (5 s).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlo_core.linear import two_pass
from rlo_core.linear.chunks import run_chunks
from rlo_core.linear.settings import NAMES, SCHEMA, Settings
from rlo_core.linear.tile import working_dtype

TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
ONCE = "a fused loss can be differentiated only once; pass impl='torch' for a second derivative"


class _Once(torch.autograd.Function):
    """Hands a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ONCE)


def _once(grad: Tensor | None, *inputs: Tensor) -> Tensor | None:
    """Attach the refusal where a graph of the backward pass is being recorded."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return cast("Tensor", _Once.apply(grad, *inputs))


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * factor rounded once to `dtype`."""
    return (x * factor).to(dtype)


def _times_now(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`_times` for tensors that hold values: a plain copy for a factor of 1, no wide one for half.

    1 is what `loss.backward()` passes down. Looking is free on a CPU; elsewhere it would wait.
    Always a copy: what the first backward pass gives away, `.grad` may be accumulated into.
    """
    x = x.detach()  # a saved output carries a graph
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1.0:
        return x.to(dtype, copy=True)
    if x.dtype == dtype:
        return _times(x, factor, dtype)
    out = torch.empty_like(x, dtype=dtype)
    for start in range(0, len(x), 4096):
        at = slice(start, start + 4096)
        out[at] = x[at] * (factor[at] if factor.dim() else factor)
    return out


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def sum_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return sum(factor * loss), the losses, and what the backward pass multiplies out."""
    sums = run_chunks(hidden, weight, bias, target, factor, Settings.of(settings))
    total = sums.loss.sum() if factor is None else torch.dot(sums.loss, factor)
    return (
        total,
        sums.loss,
        sums.scale,
        _or_empty(sums.hidden_grad, hidden),
        _or_empty(sums.weight_grad, hidden),
        _or_empty(sums.bias_grad, hidden),
    )


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, factor = inputs[:5]
    ctx.settings = Settings.of(inputs[5:])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.factor_grad = factor is not None and factor.requires_grad
    ctx.set_materialize_grads(False)  # else zeros of the weight's size for an unused output
    ctx.save_for_backward(hidden, weight, *output[1:])


def _sum_backward(
    ctx: Any, grad: Tensor, *_: Any, times: Any = _times_now
) -> tuple[Tensor | None, ...]:
    hidden, weight, loss, scale, hidden_sum, weight_sum, bias_sum = ctx.saved_tensors
    s: Settings = ctx.settings
    dh = dw = db = None
    if s.hidden_grad:
        dh = times(hidden_sum, (scale * grad).unsqueeze(1), hidden.dtype)
    if s.weight_grad:
        dw = times(weight_sum, grad, s.weight_dtype)
    if s.bias_grad:
        db = times(bias_sum, grad, ctx.bias_dtype)
    grads = (_once(g, hidden, weight) for g in (dh, dw, db))
    return (*grads, None, loss * grad if ctx.factor_grad else None, *(None,) * len(NAMES))


class LossSum(torch.autograd.Function):
    """`sum_forward` for eager calls."""

    forward = staticmethod(sum_forward)
    setup_context = staticmethod(_sum_context)
    backward = staticmethod(_sum_backward)  # type: ignore[assignment]


linear_loss_sum = torch.library.custom_op(
    "rlo_core::linear_loss_sum",
    sum_forward,
    mutates_args=(),
    schema=f"({TENSORS}, Tensor? factor, {SCHEMA}) -> ({', '.join(['Tensor'] * 6)})",
)
linear_loss_sum.register_autograd(partial(_sum_backward, times=_times), setup_context=_sum_context)


@linear_loss_sum.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    s = Settings.of(settings)
    work = working_dtype(s.compute)
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty(target.shape, dtype=work),
        hidden.new_empty(target.shape, dtype=work),
        hidden.new_empty(hidden.shape, dtype=s.compute) if s.hidden_grad else hidden.new_empty(0),
        hidden.new_empty(weight.shape, dtype=work) if s.weight_grad else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1], dtype=work) if s.bias_grad else hidden.new_empty(0),
    )


def rows_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, (N), and what the second of two passes needs of it."""
    s = Settings.of(settings)
    if s.columns:
        return two_pass.forward(hidden, weight, bias, target, s)
    loss = run_chunks(hidden, weight, bias, target, None, s.without_grads()).loss
    return loss, loss.new_empty(0)


def rows_backward(
    grad: Tensor,
    kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of sum(grad * loss) by hidden, weight, bias; empty where not needed."""
    s = Settings.of(settings)
    if s.columns:
        found = two_pass.backward(grad, hidden, weight, bias, target, kept, s)
        return (
            _or_empty(found.hidden, hidden),
            _or_empty(found.weight, hidden),
            _or_empty(found.bias, hidden),
        )
    sums = run_chunks(hidden, weight, bias, target, grad, s)
    dh = dw = db = None
    if sums.hidden_grad is not None:
        dh = _times_now(sums.hidden_grad, sums.scale.unsqueeze(1), hidden.dtype)
    if sums.weight_grad is not None:
        dw = sums.weight_grad.to(s.weight_dtype)
    if sums.bias_grad is not None and bias is not None:
        db = sums.bias_grad.to(bias.dtype)
    return _or_empty(dh, hidden), _or_empty(dw, hidden), _or_empty(db, hidden)


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = s = Settings.of(inputs[4:])
    if s.knobs is None:
        ctx.link = s.decoded()  # a link of the user's own has to outlive the graph
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[1])


def _rows_backward(
    ctx: Any, grad: Tensor | None, _: Any = None, run: Any = rows_backward
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, kept = ctx.saved_tensors
    s: Settings = ctx.settings
    if grad is None:
        return (None,) * (4 + len(NAMES))
    found = run(grad.contiguous(), kept.detach(), hidden, weight, bias, target, *s.arguments())
    needs = (s.hidden_grad, s.weight_grad, s.bias_grad)
    grads = (
        _once(g, hidden, weight) if need else None for g, need in zip(found, needs, strict=True)
    )
    return (*grads, None, *(None,) * len(NAMES))


class LossRows(torch.autograd.Function):
    """`rows_forward` for eager calls."""

    forward = staticmethod(rows_forward)
    setup_context = staticmethod(_rows_context)

    backward = staticmethod(_rows_backward)


linear_loss_rows = torch.library.custom_op(
    "rlo_core::linear_loss_rows",
    rows_forward,
    mutates_args=(),
    schema=f"({TENSORS}, {SCHEMA}) -> (Tensor, Tensor)",
)
linear_loss_rows_backward = torch.library.custom_op(
    "rlo_core::linear_loss_rows_backward",
    rows_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor kept, {TENSORS}, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
linear_loss_rows.register_autograd(
    partial(_rows_backward, run=linear_loss_rows_backward), setup_context=_rows_context
)


@linear_loss_rows.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    s = Settings.of(settings)
    work = working_dtype(s.compute)
    kept = (two_pass.kept_numbers(s), *target.shape) if s.columns else (0,)
    return hidden.new_empty(target.shape, dtype=work), hidden.new_empty(kept, dtype=work)


@linear_loss_rows_backward.register_fake
def _(
    grad: Tensor,
    kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    s = Settings.of(settings)
    weight_shape: Any = weight.shape if s.weight_grad else 0
    return (
        hidden.new_empty(hidden.shape if s.hidden_grad else 0),
        weight.new_empty(weight_shape, dtype=s.weight_dtype),
        weight.new_empty(0) if bias is None or not s.bias_grad else bias.new_empty(bias.shape),
    )
