"""The plain case, eager on the CPU: (N, C) logits, index targets, no class weights, no smoothing.

It is what a training loop calls each step, and there the price is set by the number of small
operations and by how often the exponentials of all N * C logits are computed. Softmax computes
them once and backward only scales what it kept; `F.cross_entropy` computes them again in backward.
Every other case, and everything under `torch.compile` or `torch.func`, is composed from
differentiable operations in `rlo_core.functional`, with the same results.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_core._arguments import check_labels
from rlo_core._compat import forward_mode, transforms_active
from rlo_core.links import Link

NARROW = 48
"""Classes below which torch's row-wise softmax kernel is slower than amax, sub, exp and sum: 90
against 22 us at 512 x 10 on an AVX-512 core, 46 against 72 us at 512 x 100."""

SMALL = 1 << 17
"""Elements of half-precision logits up to which p is kept in float32: fewer operations, and the
memory is that of a small tensor."""

PART = 1 << 20
"""Elements of larger half-precision logits that are in float32 at a time, 4 MiB: few enough parts
that their operations do not show. Half of it in backward, where the gradient is held too."""

SMALLEST_P = 1e-30
"""Where -log p has all its digits: below, p comes near the smallest normal float32."""


def is_plain(logits: Tensor, target: Tensor) -> bool:
    """Return whether `row_loss` may be used: the shapes agree and nothing is traced or wrapped."""
    return (
        logits.is_cpu
        and target.is_cpu
        and target.dtype is torch.int64
        and logits.is_floating_point()
        and logits.dim() == 2
        and logits.shape[:1] == target.shape
        and logits.numel() > 0
        and type(logits) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not forward_mode()
    )


def row_loss(
    logits: Tensor, target: Tensor, link: Link, ignore_index: int, reduction: str
) -> Tensor:
    """Return `link(ce)` of each row, reduced; as `link_cross_entropy` where `is_plain` holds."""
    loss: Tensor = _RowLoss.apply(logits, target, link, ignore_index, reduction)[0]
    return loss


class _RowLoss(torch.autograd.Function):
    """(loss, ce, q) of the logits, ce of shape (N, 1); the caller sees the loss only.

    q = p - y, with y one-hot, is the gradient of cross entropy: backward has only to scale its
    rows. ce and q are outputs so that backward can save them with their history: written in them it
    is differentiable again, and the logits themselves need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, link: Link, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, dropped, picked = target.unsqueeze(1), None, None
        by_parts = logits.itemsize == 2 and logits.numel() > SMALL
        source = logits if by_parts else _softmax(logits)
        if ignore_index < 0:
            # gather checks every index, which makes a check of our own needless: it fails where a
            # target is to be ignored, and where one is wrong.
            with contextlib.suppress(RuntimeError):
                picked = source.gather(1, index)
        if picked is None:
            check_labels(target, logits.shape[1], ignore_index)
            dropped = index == ignore_index
            index = index.masked_fill(dropped, 0)
            picked = source.gather(1, index)
        q, picked = _residual_by_parts(logits, index) if by_parts else (source, picked)
        ordinary = picked.min().item() > SMALLEST_P
        unsure = None if ordinary else ~(picked > SMALLEST_P).squeeze(1)  # NaN comes here too
        log_p = picked.log_()
        if unsure is not None:
            z = logits[unsure].to(log_p.dtype)
            log_p[unsure] = -F.cross_entropy(z, index[unsure, 0], reduction="none").unsqueeze(1)
        if not by_parts:
            q.scatter_(1, index, torch.expm1(log_p))
        ce = log_p.neg()
        loss = link.value(ce)
        if dropped is not None:
            loss = loss.masked_fill(dropped, 0.0)
        elif loss is ce:  # an output may not be two outputs
            loss = ce.clone()
        kept: int | Tensor = len(target)
        if reduction == "none":
            loss = loss.squeeze(1)
        elif reduction == "sum":
            loss = loss.sum()
        elif dropped is None:
            loss = loss.mean()
        else:
            kept = len(target) - dropped.sum()
            loss = loss.sum() / kept
            kept = kept.clamp(min=1)  # an empty mean is NaN, its derivatives are zero
        ctx.save_for_backward(q, ce, index, dropped)
        ctx.options = link, kept, reduction, logits.dtype
        ctx.set_materialize_grads(False)
        return loss, ce, q

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_ce: Tensor | None, grad_q: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        q, ce, index, dropped = ctx.saved_tensors
        link, kept, reduction, dtype = ctx.options
        if grad is None:
            scale = torch.zeros_like(ce)
        else:
            grad = grad.unsqueeze(1) if reduction == "none" else grad
            scale = link.slope(ce) * (grad / kept if reduction == "mean" else grad)
            if dropped is not None:
                scale = scale.masked_fill(dropped, 0.0)
        if grad_ce is not None:
            scale = scale + grad_ce
        if dtype.itemsize == 2 and q.numel() > SMALL and not torch.is_grad_enabled():
            return _gradient_by_parts(q, scale, dtype), None, None, None, None
        out = q * scale
        if grad_q is not None:
            p = q.scatter_add(1, index, torch.ones_like(ce, dtype=q.dtype))
            out = out + p * (grad_q - (p * grad_q).sum(1, keepdim=True))
        return out.to(dtype), None, None, None, None


def _softmax(logits: Tensor) -> Tensor:
    """Return softmax of each row, float32 or wider."""
    x = logits.float() if logits.itemsize == 2 else logits
    if logits.shape[1] >= NARROW:
        return torch.softmax(x, 1)
    e = (x - x.amax(1, keepdim=True)).exp_()
    return e.div_(e.sum(1, keepdim=True))


def _residual_by_parts(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax - one-hot of half-precision logits, (N, C), and softmax at `index`, (N, 1).

    Computed in float32, and so are the entries. The first is kept in bfloat16 where the logits are:
    that puts the gradient, which is rounded to bfloat16 in the end, within one unit in its last
    place. float16 has not the range for it.
    """
    kept = torch.bfloat16 if logits.dtype == torch.bfloat16 else torch.float32
    q = torch.empty(logits.shape, dtype=kept)
    picked = torch.empty(len(logits), 1)
    rows = min(max(1, PART // logits.shape[1]), len(logits))
    # One buffer for all parts: memory asked for anew would be mapped page by page each time.
    buffer = torch.empty(rows, logits.shape[1])
    parts = (torch.split(tensor, rows) for tensor in (logits, index, q, picked))
    for logits_, index_, q_, picked_ in zip(*parts, strict=True):
        part = buffer[: len(q_)].copy_(logits_)
        torch.softmax(part, 1, out=part)
        torch.gather(part, 1, index_, out=picked_)
        q_.copy_(part.scatter_(1, index_, picked_ - 1.0))
    return q, picked


def _gradient_by_parts(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient in half precision, with a part of the rows in float32 at a time."""
    out = torch.empty(q.shape, dtype=dtype)
    rows = min(max(1, PART // 2 // q.shape[1]), len(q))
    buffer = torch.empty(rows, q.shape[1])
    parts = (torch.split(tensor, rows) for tensor in (q, scale, out))
    for q_, scale_, out_ in zip(*parts, strict=True):
        out_.copy_(buffer[: len(q_)].copy_(q_).mul_(scale_))
    return out
