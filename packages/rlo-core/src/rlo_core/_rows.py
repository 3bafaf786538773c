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
from torch import Tensor
from torch.autograd import forward_ad

from rlo_core._check import check_labels
from rlo_core.links import Link

NARROW = 48
"""Classes below which torch's row-wise softmax kernel is slower than amax, sub, exp and sum: 90
against 22 us at 512 x 10 on an AVX-512 core, 46 against 72 us at 512 x 100."""

CHUNK = 1 << 16
"""Elements of half-precision logits that are in float32 at a time, at least: 256 KiB stay in the
cache. Of large logits a 512th part is, which adds 0.1 % to the peak."""

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
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def row_loss(
    logits: Tensor, target: Tensor, link: Link, ignore_index: int, reduction: str
) -> Tensor:
    """Return `link(ce)` of each row, reduced; as `link_cross_entropy` where `is_plain` holds."""
    loss: Tensor = _RowLoss.apply(logits, target, link, ignore_index, reduction)[0]
    return loss


class _RowLoss(torch.autograd.Function):
    """(loss, ce, p) of the logits, ce of shape (N, 1); the caller sees the loss only.

    ce and p are outputs so that backward can save them with their history: written in them it is
    differentiable again, and the logits themselves need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, link: Link, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, dropped, p_y = target.unsqueeze(1), None, None
        kept: int | Tensor = len(target)
        p = _softmax(logits)
        if ignore_index < 0:
            # gather checks every index, which makes a check of our own needless: it fails where a
            # target is to be ignored, and where one is wrong.
            with contextlib.suppress(RuntimeError):
                p_y = p.gather(1, index)
        if p_y is None:
            check_labels(target, logits.shape[1], ignore_index)
            dropped = index == ignore_index
            index = index.masked_fill(dropped, 0)
            kept = len(target) - dropped.sum()
            p_y = p.gather(1, index)
        if p_y.min().item() > SMALLEST_P:
            ce = p_y.log_().neg_()
        else:  # NaN comes here too
            ce = _exact_cross_entropy(logits, p, index)
        loss = link.value(ce)
        if dropped is not None:
            loss = loss.masked_fill(dropped, 0.0)
        elif loss is ce:  # an output may not be two outputs
            loss = ce.clone()
        if reduction == "none":
            loss = loss.squeeze(1)
        else:
            loss = loss.sum()
            if reduction == "mean":
                loss /= kept
        ctx.save_for_backward(p, ce, index, dropped)
        ctx.options = link, kept, reduction, logits.dtype
        ctx.set_materialize_grads(False)
        return loss, ce, p

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_ce: Tensor | None, grad_p: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        p, ce, index, dropped = ctx.saved_tensors
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
        if p.dtype != dtype and not torch.is_grad_enabled():
            return _half_gradient(p, index, scale, dtype), None, None, None, None
        out = (p * scale).scatter_add_(1, index, -scale)
        if grad_p is not None:
            out = out + p * (grad_p - (p * grad_p).sum(1, keepdim=True))
        return out.to(dtype), None, None, None, None


def _softmax(logits: Tensor) -> Tensor:
    """Return softmax of each row, float32 or wider."""
    if logits.shape[1] < NARROW:
        x = logits.float() if logits.itemsize == 2 else logits
        e = (x - x.amax(1, keepdim=True)).exp_()
        return e.div_(e.sum(1, keepdim=True))
    if logits.itemsize > 2:
        return torch.softmax(logits, 1)
    p = torch.empty(logits.shape, dtype=torch.float32)
    rows = _rows_at_a_time(logits)
    for part, out in zip(torch.split(logits, rows), torch.split(p, rows), strict=True):
        torch.softmax(part.float(), 1, out=out)
    return p


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, max(CHUNK, logits.numel() >> 9) // logits.shape[1])


def _exact_cross_entropy(logits: Tensor, p: Tensor, index: Tensor) -> Tensor:
    """Return logsumexp - z_y where p_y underflows; logsumexp is z_max - log p_max, p_max >= 1/C."""
    z_y, z_max = logits.gather(1, index).to(p.dtype), logits.amax(1, keepdim=True).to(p.dtype)
    return (z_max - z_y) - p.amax(1, keepdim=True).log()


def _half_gradient(p: Tensor, index: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient in half precision, with a part of the rows in float32 at a time."""
    out = torch.empty(p.shape, dtype=dtype)
    rows = _rows_at_a_time(p)
    parts = (torch.split(tensor, rows) for tensor in (p, index, scale, out))
    for p_, index_, scale_, out_ in zip(*parts, strict=True):
        out_.copy_((p_ * scale_).scatter_add_(1, index_, -scale_))
    return out
