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
        index, dropped, picked = target.unsqueeze(1), None, None
        kept: int | Tensor = len(target)
        half = logits.itemsize == 2 and logits.shape[1] >= NARROW
        if half:
            p, z_max, p_max = _half_softmax(logits)
        else:
            p = _softmax(logits)
        source = logits if half else p
        if ignore_index < 0:
            # gather checks every index, which makes a check of our own needless: it fails where a
            # target is to be ignored, and where one is wrong.
            with contextlib.suppress(RuntimeError):
                picked = source.gather(1, index)
        if picked is None:
            check_labels(target, logits.shape[1], ignore_index)
            dropped = index == ignore_index
            index = index.masked_fill(dropped, 0)
            kept = len(target) - dropped.sum()
            picked = source.gather(1, index)
        if half:
            ce = (z_max - picked) - p_max.log()
        elif picked.min().item() > SMALLEST_P:
            ce = picked.log_().neg_()
        else:  # NaN comes here too
            z_max = logits.amax(1, keepdim=True).to(p.dtype)
            ce = (z_max - logits.gather(1, index)) - p.amax(1, keepdim=True).log()
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
        # p - 1 of the right class, without the digits that the subtraction would lose.
        at_target = torch.expm1(-ce) * scale
        if dtype.itemsize == 2 and not torch.is_grad_enabled():
            return _half_gradient(p, index, scale, at_target, dtype), None, None, None, None
        out = (p * scale).scatter_(1, index, at_target)
        if grad_p is not None:
            out = out + p * (grad_p - (p * grad_p).sum(1, keepdim=True))
        return out.to(dtype), None, None, None, None


def _softmax(logits: Tensor) -> Tensor:
    """Return softmax of each row, float32 or wider."""
    if logits.shape[1] >= NARROW:
        return torch.softmax(logits, 1)
    x = logits.float() if logits.itemsize == 2 else logits
    e = (x - x.amax(1, keepdim=True)).exp_()
    return e.div_(e.sum(1, keepdim=True))


def _half_softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return softmax, the largest logit and the largest p of each row, computed in float32.

    p itself is kept in bfloat16 where the logits are: that puts the gradient, which is rounded to
    bfloat16 in the end, within one unit in its last place. float16 has not the range for p.
    log p_y is z_y - z_max + log p_max, and p_max is at least 1/C: no p underflows on the way.
    """
    kept = torch.bfloat16 if logits.dtype == torch.bfloat16 else torch.float32
    p = torch.empty(logits.shape, dtype=kept)
    z_max, p_max = torch.empty(2, len(logits), 1).unbind()
    rows = min(_rows_at_a_time(logits), len(logits))
    # Two buffers for all parts: memory asked for anew would be mapped page by page each time.
    z, q = torch.empty(2, rows, logits.shape[1]).unbind()
    parts = (torch.split(tensor, rows) for tensor in (logits, p, z_max, p_max))
    for z_, p_, z_max_, p_max_ in zip(*parts, strict=True):
        n = len(z_)
        torch.amax(z[:n].copy_(z_), 1, keepdim=True, out=z_max_)
        torch.softmax(z[:n], 1, out=q[:n])
        torch.amax(q[:n], 1, keepdim=True, out=p_max_)
        p_.copy_(q[:n])
    return p, z_max, p_max


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, max(CHUNK, logits.numel() >> 9) // logits.shape[1])


def _half_gradient(
    p: Tensor, index: Tensor, scale: Tensor, at_target: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient in half precision, with a part of the rows in float32 at a time."""
    out = torch.empty(p.shape, dtype=dtype)
    rows = min(_rows_at_a_time(p), len(p))
    buffer = torch.empty(rows, p.shape[1])
    parts = (torch.split(tensor, rows) for tensor in (p, index, scale, at_target, out))
    for p_, index_, scale_, at_target_, out_ in zip(*parts, strict=True):
        part = torch.mul(p_, scale_, out=buffer[: len(p_)])
        out_.copy_(part.scatter_(1, index_, at_target_))
    return out
