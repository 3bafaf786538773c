"""The fused linear loss with gates, and the statistics of its rows; the logits are never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlo_core._row_statistics import tile_statistics
from rlo_core.errors import SpecError
from rlo_core.functional import IGNORE_INDEX
from rlo_core.gates import Gate, RowStatistics, gate_factor, needs_of, top_of
from rlo_core.linear.arguments import check_linear
from rlo_core.linear.chunks import run_chunks
from rlo_core.linear.ops import _once, _times_now
from rlo_core.linear.plan import compute_dtype, plan_linear_loss
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import working_dtype
from rlo_core.links import Link


class Observer:
    """Takes the statistics of each chunk, and gives the factor of its rows.

    Args:
        tokens: N.
        like: A tensor on the device, for where the statistics go.
        names: The statistics to keep.
        gates: Those that look at one row at a time.
        top: K of "top_entropy".
        softcap: Of the logits.
        reference_ce: (N) or None.
    """

    def __init__(
        self,
        tokens: int,
        like: Tensor,
        names: Sequence[str],
        gates: Sequence[Gate],
        *,
        top: int,
        softcap: float | None,
        reference_ce: Tensor | None,
    ) -> None:
        self.names, self.gates, self.top, self.softcap = tuple(names), gates, top, softcap
        self.reference_ce = reference_ce
        self.found = {name: like.new_zeros(tokens) for name in ("ce", *names)}
        self.classes = 0

    def __call__(self, tile: Tensor, target: Tensor, at: Any) -> Tensor | None:
        """Keep the statistics of the rows `at`, whose logits are `tile`; return their factor."""
        self.classes = tile.shape[1]
        found = tile_statistics(tile, target, self.names, softcap=self.softcap, top=self.top)
        for name, value in found.items():
            self.found[name][at] = value
        if not self.gates:
            return None
        reference = None if self.reference_ce is None else self.reference_ce[at]
        rows = RowStatistics(**found, reference_ce=reference, classes=self.classes)
        return gate_factor(self.gates, rows)

    def rows(self) -> RowStatistics:
        """Return the statistics of all rows."""
        return RowStatistics(**self.found, reference_ce=self.reference_ce, classes=self.classes)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        factor: Tensor | None,
        observer: Observer,
        settings: Settings,
    ) -> Tensor:
        sums = run_chunks(hidden, weight, bias, target, factor, settings, observer)
        ctx.factor_grad = factor is not None and factor.requires_grad
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.sums = sums
        return sums.loss.sum() if factor is None else torch.dot(sums.loss, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sums, (hidden_dtype, weight_dtype, bias_dtype) = ctx.sums, ctx.dtypes
        dh = dw = db = None
        if sums.hidden_grad is not None:
            dh = _times_now(sums.hidden_grad, (sums.scale * grad).unsqueeze(1), hidden_dtype)
        if sums.weight_grad is not None:
            dw = _times_now(sums.weight_grad, grad, weight_dtype)
        if sums.bias_grad is not None:
            db = _times_now(sums.bias_grad, grad, bias_dtype)
        grads = tuple(_once(g, grad) for g in (dh, dw, db))
        return (*grads, None, sums.loss * grad if ctx.factor_grad else None, None, None)


def gated_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    link: Link,
    gates: Sequence[Gate] = (),
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "sum",
    softcap: float | None = None,
    statistics: Sequence[str] = (),
    reference_ce: Tensor | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, RowStatistics]:
    r"""Return :math:`\sum_t w_t\,g_t\,link(ce_t)` of a linear layer, and statistics of its rows.

    As `link_linear_cross_entropy`, with gates: their statistics come out of each chunk's logits
    while these are there. Three matrix products, and one more over all rows for a gate that ranks
    the batch, whose other products then run over the chosen rows only.

    Args:
        hidden: (N, D).
        weight: (V, D).
        target: int64, (N).
        link: The map from cross entropy to loss.
        gates: Detached factors of each token's loss, multiplied.
        bias: (V) or None.
        ignore_index: Tokens with this target count for nothing.
        label_smoothing: In [0, 1]; not with gates.
        token_weight: (N) or None.
        reduction: "sum", or "mean": by the sum of `token_weight` over kept tokens, or their number.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        statistics: More statistics to return, of "entropy", "top1", "sum_sq", "correct".
        reference_ce: (N), the loss of each token under a reference model, for gates that need it.
        memory_budget: Bytes for the logits that exist at a time.

    Returns:
        A scalar, and the statistics of all rows, (N) each, 0 where ignored (on the CPU).

    Raises:
        ValueError, TypeError, IndexError: on the wrong shape, dtype, device, option or label.
        SpecError: a gate needs a reference and there is none.

    Example:
        >>> from rlo_core.gates import DEFT
        >>> hidden, weight = torch.ones(2, 3), torch.zeros(4, 3)
        >>> loss, rows = gated_linear_cross_entropy(
        ...     hidden, weight, torch.tensor([0, 1]), CE(), [DEFT()], reduction="mean"
        ... )
        >>> round(float(loss), 4), round(float(rows.ce[0]), 4)
        (0.9803, 1.3863)
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    check_linear(
        hidden,
        weight,
        target,
        link,
        bias=bias,
        classes=weight.shape[0],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        reduction=reduction,
        softcap=softcap,
        shift=False,
        impl="chunked",
        memory_budget=memory_budget,
    )
    if gates and label_smoothing:
        raise ValueError(f"gates take no label smoothing, got {label_smoothing}")
    if any("reference_ce" in gate.needs for gate in gates) and reference_ce is None:
        raise SpecError("this gate needs a reference model: reference_ce was not given")
    plan = plan_linear_loss(
        hidden, weight, link, bias=bias, impl="chunked", memory_budget=memory_budget
    )
    compute = compute_dtype(hidden)
    work = working_dtype(compute)
    settings = Settings(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        compute=compute,
        rows=plan.rows,
        classes=weight.shape[0],
    )
    kept = target != ignore_index
    factor = None
    if token_weight is not None:
        factor = token_weight.to(work).masked_fill(~kept, 0.0)
    count = kept.sum() if factor is None else factor.sum().detach()
    like = hidden.new_zeros((), dtype=work)
    whole = [gate for gate in gates if gate.whole]
    single = [gate for gate in gates if not gate.whole]
    names = dict.fromkeys((*needs_of(gates), *statistics))

    def observer(gates: Sequence[Gate]) -> Observer:
        return Observer(
            len(target),
            like,
            tuple(names),
            gates,
            top=top_of(gates),
            softcap=softcap,
            reference_ce=None if reference_ce is None else reference_ce.to(work),
        )

    first = None
    if whole:
        first = observer(())
        run_chunks(hidden, weight, bias, target, None, settings, first)
        rows = first.rows()
        chosen = _of_kept(rows, kept)
        share = torch.zeros_like(rows.ce)
        share[kept] = gate_factor(whole, chosen)
        factor = share if factor is None else factor * share
        target = target.masked_fill(share == 0, ignore_index)
    second = observer(single)
    settings = settings.with_link(link).with_grads(hidden, weight, bias)
    total: Tensor = _GatedSum.apply(hidden, weight, bias, target, factor, second, settings)
    if reduction == "mean":
        total = total / count.where(count != 0, 1)
    return total, (first or second).rows()


def _of_kept(rows: RowStatistics, kept: Tensor) -> RowStatistics:
    values: dict[str, Any] = {
        name: value[kept] if isinstance(value, Tensor) else value
        for name, value in vars(rows).items()
    }
    return RowStatistics(**values)
