"""Log-probabilities of labels under a linear layer, and statistics of its rows, without the logits.

For objectives whose weight of a token is known only after all tokens have been seen: preference and
policy losses. What is known at once is computed at once, the gradient by the hidden states up to
the factor of each row; the weight's gradient computes the logits once more, for rows that have a
gradient only. A frozen layer (adapters) needs no second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlo_core.functional import IGNORE_INDEX
from rlo_core.gates import RowStatistics
from rlo_core.linear.arguments import check_linear
from rlo_core.linear.chunks import run_chunks
from rlo_core.linear.gated import Observer
from rlo_core.linear.ops import _once, _times_now
from rlo_core.linear.plan import compute_dtype, plan_linear_loss
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import working_dtype
from rlo_core.links import CE


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        observer: Observer,
        settings: Settings,
    ) -> Tensor:
        first = replace(settings, weight_grad=False, bias_grad=False)
        sums = run_chunks(hidden, weight, bias, target, None, first, observer)
        ctx.settings, ctx.dtype = settings, hidden.dtype
        ctx.save_for_backward(hidden, weight, bias, target, sums.hidden_grad)
        return -sums.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, target, hidden_grad = ctx.saved_tensors
        settings: Settings = ctx.settings
        dh = dw = db = None
        grad = -grad.detach().masked_fill(target == settings.ignore_index, 0.0)
        if hidden_grad is not None:
            dh = _times_now(hidden_grad, grad.unsqueeze(1), ctx.dtype)
        if settings.weight_grad or settings.bias_grad:
            second = replace(settings, hidden_grad=False)
            weighted = target.masked_fill(grad == 0, settings.ignore_index)
            sums = run_chunks(hidden, weight, bias, weighted, grad, second)
            if sums.weight_grad is not None:
                dw = sums.weight_grad.to(weight.dtype)
            if sums.bias_grad is not None:
                db = sums.bias_grad.to(bias.dtype)
        return (*(_once(g, hidden) for g in (dh, dw, db)), None, None, None)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    statistics: Sequence[str] = (),
    memory_budget: int | None = None,
) -> tuple[Tensor, RowStatistics]:
    r"""Return :math:`\log p_{y_t}` of `hidden @ weight.T + bias`, and statistics of its rows.

    Two matrix products forward and two backward; two and none where `weight` is frozen; one without
    gradients.

    Args:
        hidden: (N, D).
        weight: (V, D).
        target: int64, (N).
        bias: (V) or None.
        ignore_index: Tokens with this target give 0.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        statistics: Of "entropy", "top1", "sum_sq", "correct", "mean_logit"; without gradient.
        memory_budget: Bytes for the logits that exist at a time.

    Returns:
        The log-probabilities in nats, (N), float32 or wider, which have a gradient, and the
        statistics of the rows, (N) each.

    Raises:
        ValueError, TypeError, IndexError: on the wrong shape, dtype, device, option or label.

    Example:
        >>> hidden, weight = torch.ones(2, 3), torch.zeros(4, 3)
        >>> log_p, rows = linear_log_probs(
        ...     hidden, weight, torch.tensor([0, 1]), statistics=("entropy",)
        ... )
        >>> round(float(log_p[0]), 4), round(float(rows.entropy[0]), 4)
        (-1.3863, 1.3863)
    """
    check_linear(
        hidden,
        weight,
        target,
        CE(),
        bias=bias,
        classes=weight.shape[0],
        ignore_index=ignore_index,
        label_smoothing=0.0,
        token_weight=None,
        reduction="none",
        softcap=softcap,
        shift=False,
        impl="chunked",
        memory_budget=memory_budget,
    )
    plan = plan_linear_loss(
        hidden, weight, CE(), bias=bias, impl="chunked", memory_budget=memory_budget
    )
    compute = compute_dtype(hidden)
    settings = Settings(
        ignore_index=ignore_index,
        softcap=softcap,
        compute=compute,
        rows=plan.rows,
        classes=weight.shape[0],
    ).with_grads(hidden, weight, bias)
    observer = Observer(
        len(target),
        hidden.new_zeros((), dtype=working_dtype(compute)),
        tuple(statistics),
        (),
        top=20,
        softcap=softcap,
        reference_ce=None,
    )
    log_probs: Tensor = _LogProbs.apply(hidden, weight, bias, target, observer, settings)
    return log_probs, observer.rows()
