r"""Smoothed and soft targets under the bounded links, eager on the CPU, in one pass of its own.

With :math:`e_c = p_c^{1/k}` the loss of a row is :math:`m\sum_c q_c (1 - e_c)`, and with
:math:`s_c = (m/k)\,q_c e_c` its gradient is :math:`p_j \sum_c s_c - s_j`. So two exponentials of
each logit do, as many as cross entropy itself takes with its backward, and the smoothed link needs
no tensor of links: the mean of e. Composed of differentiable operations the same loss takes five
full tensors more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlo_core._compat import forward_mode, transforms_active
from rlo_core._cpu_rows import _softmax
from rlo_core.links import GCE, Link, Rooted

FEW_DIGITS = 0.01
"""Losses (over m) below which 1 - e has lost digits that show, and expm1 is taken for the row."""

Composed = Callable[[Tensor], Tensor]
"""The same loss of the logits, by differentiable operations: for derivatives of the gradient."""


def bounded_root(link: Link) -> tuple[float, float] | None:
    """Return (k, m) of a link that is m(1 - p^(1/k)), None for any other."""
    if type(link) is Rooted and link.k != float("inf"):
        return link.k, link.multiplier
    if type(link) is GCE:
        return 1.0 / link.q, 1.0 / link.q
    return None


def is_soft_row(logits: Tensor, target: Tensor) -> bool:
    """Return whether `soft_row_loss` may be used: (N, C) on the CPU, nothing traced or wrapped."""
    return (
        logits.is_cpu
        and target.is_cpu
        and logits.dim() == 2
        and logits.numel() > 0
        and logits.is_floating_point()
        and not target.requires_grad
        and (target.is_floating_point() or target.dtype is torch.int64)
        and type(logits) in (Tensor, torch.nn.Parameter)
        and type(target) is Tensor
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not forward_mode()
    )


def soft_row_loss(
    logits: Tensor,
    target: Tensor,
    root: tuple[float, float],
    *,
    ignore_index: int,
    smoothing: float,
    reduction: str,
    composed: Composed,
) -> Tensor | None:
    """Return the loss of checked arguments; None where a label is to be ignored or is wrong."""
    index: Tensor | None = None
    if not target.is_floating_point():
        index = target.unsqueeze(1)
        if ignore_index >= 0 or int(target.min()) < 0 or int(target.max()) >= logits.shape[1]:
            return None
    loss: Tensor = _SoftRowLoss.apply(logits, target, index, root, smoothing, reduction, composed)
    return loss


class _SoftRowLoss(torch.autograd.Function):
    """The loss; p, e (or q e) and the weights of their rows are kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        index: Tensor | None,
        root: tuple[float, float],
        smoothing: float,
        reduction: str,
        composed: Composed,
    ) -> Tensor:
        k, m = root
        x = logits.float() if logits.itemsize == 2 else logits
        p = _softmax(x)
        # p itself has no digits left where it underflows; (x - logsumexp)/k has.
        offset = (p.amax(1, keepdim=True).log_() - x.amax(1, keepdim=True)).mul_(1.0 / k)
        e = torch.add(offset, x, alpha=1.0 / k).exp_()
        if index is not None:
            # 1 - e has few digits where p is nearly 1, so the label's own is computed by expm1.
            own = torch.add(offset, x.gather(1, index), alpha=1.0 / k)
            right = own.exp().mul_(1.0 - smoothing)
            mean = e.mean(1, keepdim=True).mul_(smoothing)
            rows = (smoothing - mean - (1.0 - smoothing) * own.expm1()).mul_(m)
            kept, weighted = mean + right, e
            ctx.parts = index, smoothing / x.shape[1], right
        else:
            q = target if target.dtype == x.dtype else target.to(x.dtype)
            if smoothing > 0.0:
                q = q * (1.0 - smoothing) + smoothing / x.shape[1]
            weighted = e.mul_(q)
            kept = weighted.sum(1, keepdim=True)
            rows = q.sum(1, keepdim=True) - kept
            few = (rows < FEW_DIGITS).squeeze(1)
            if few.any():
                logs = torch.add(offset[few], x[few], alpha=1.0 / k)
                rows[few] = (logs.expm1_() * q[few]).sum(1, keepdim=True).neg_()
            rows = rows.mul_(m)
            ctx.parts = None
        ctx.count = 1 if reduction != "mean" else len(logits)
        ctx.reduction, ctx.scale, ctx.composed = reduction, m / k, composed
        ctx.save_for_backward(logits, p, weighted, kept)
        if reduction == "none":
            return rows.squeeze(1)
        return rows.sum() if reduction == "sum" else rows.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        logits, p, weighted, kept = ctx.saved_tensors
        nothing = (None,) * 6
        if torch.is_grad_enabled():  # a derivative of this will be asked for
            (again,) = torch.autograd.grad(ctx.composed(logits), logits, grad, create_graph=True)
            return again, *nothing
        scale = (grad.unsqueeze(1) if ctx.reduction == "none" else grad) * (ctx.scale / ctx.count)
        out = p * (kept * scale)
        if ctx.parts is None:
            out.addcmul_(weighted, scale.expand(1, 1) if scale.dim() == 0 else scale, value=-1.0)
        else:
            index, spread, right = ctx.parts
            even = scale * spread
            out.addcmul_(weighted, even.expand(1, 1) if even.dim() == 0 else even, value=-1.0)
            out.scatter_add_(1, index, right * -scale)
        return out.to(logits.dtype), *nothing
