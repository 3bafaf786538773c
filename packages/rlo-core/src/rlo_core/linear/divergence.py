"""The divergence of a linear layer's distribution from that of a reference, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlo_core.linear.ops import _once, _times_now
from rlo_core.linear.plan import compute_dtype, plan_linear_loss
from rlo_core.linear.tile import working_dtype
from rlo_core.links import CE

Layer = tuple[Tensor, Tensor, Tensor | None, float | None]
"""Hidden states (N, D), weight (V, D), bias (V) or None, softcap or None."""


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        reference: Layer,
        factor: Tensor | None,
        temperature: float,
        rows: int,
    ) -> Tensor:
        compute = compute_dtype(hidden)
        work = working_dtype(compute)
        needs = ctx.needs_input_grad[:3]
        w, b = weight.to(compute), None if bias is None else bias.to(compute)
        dh = torch.zeros_like(hidden, dtype=work) if needs[0] else None
        dw = torch.zeros_like(weight, dtype=work) if needs[1] else None
        db = torch.zeros_like(bias, dtype=work) if needs[2] and bias is not None else None
        total = hidden.new_zeros((), dtype=work)
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            h = hidden[at].to(compute)
            z, slope = _capped(torch.nn.functional.linear(h, w, b).to(work), softcap)
            with torch.no_grad():
                states, layer, offset, cap = reference
                found = torch.nn.functional.linear(states[at], layer, offset)
                other, _ = _capped(found.to(work), cap)
            log_p = (z / temperature).log_softmax(-1)
            log_q = (other / temperature).log_softmax(-1)
            q = log_q.exp()
            loss = (q * (log_q - log_p)).sum(-1)
            share = None if factor is None else factor[at].to(work)
            total += loss.sum() if share is None else torch.dot(loss, share)
            grad = log_p.exp_().sub_(q).div_(temperature)
            grad = grad if slope is None else grad.mul_(slope)
            grad = grad if share is None else grad.mul_(share.unsqueeze(1))
            if db is not None:
                db += grad.sum(0)
            grad = grad.to(compute)
            if dh is not None:
                dh[at] = grad @ w
            if dw is not None:
                dw += (grad.t() @ h).to(work)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = (dh, dw, db)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = [
            None if g is None else _once(_times_now(g, grad, dtype), grad)
            for g, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None, None, None)


def _capped(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the capped logits, and their derivative by the raw ones."""
    if softcap is None:
        return z, None
    t = (z / softcap).tanh_()
    return t * softcap, 1.0 - t * t


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    reference: Layer,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Return :math:`\sum_t w_t\,KL(q_t\,\|\,p_t)`, p of `hidden @ weight.T`, q of a reference.

    The gradient by the logits is p - q, finished chunk by chunk: four matrix products, one of them
    the reference's.

    Args:
        hidden: (N, D).
        weight: (V, D).
        reference: Hidden states (N, E), weight (V, E), bias, softcap of the reference; constants.
        bias: (V) or None.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        temperature: Both sides' logits are divided by it.
        token_weight: (N) or None.
        memory_budget: Bytes for the logits that exist at a time.

    Raises:
        ValueError: the reference has another number of tokens or classes.

    Example:
        >>> hidden, weight = torch.ones(1, 3), torch.zeros(4, 3)
        >>> float(linear_kl_divergence(hidden, weight, (hidden, weight, None, None)))
        0.0
    """
    states, other, *_ = reference
    if len(states) != len(hidden) or len(other) != len(weight):
        raise ValueError(
            f"the reference must have {len(hidden)} tokens and {len(weight)} classes, got "
            f"{len(states)} and {len(other)}"
        )
    plan = plan_linear_loss(
        hidden, weight, CE(), bias=bias, impl="chunked", memory_budget=memory_budget
    )
    rows = max(1, plan.rows // 4)  # four tiles in float32 exist at a time
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = _Divergence.apply(
            hidden, weight, bias, softcap, reference, token_weight, temperature, rows
        )
    return found
