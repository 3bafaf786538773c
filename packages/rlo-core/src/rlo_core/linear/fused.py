"""The public function: check, plan, run one implementation, reduce."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_core._compat import FakeTensor
from rlo_core._cross_entropy import apply_link
from rlo_core.functional import IGNORE_INDEX, Reduction
from rlo_core.linear.arguments import Impl, check_linear
from rlo_core.linear.cce import cce_rows, check_cce
from rlo_core.linear.link_codes import is_built_in
from rlo_core.linear.ops import LossRows, LossSum, linear_loss_rows, linear_loss_sum
from rlo_core.linear.parallel import Shard, local_tensors
from rlo_core.linear.plan import compute_dtype, plan_of
from rlo_core.linear.settings import Settings
from rlo_core.linear.tile import working_dtype
from rlo_core.linear.torch_impl import torch_rows
from rlo_core.links import CE, Link, Rooted


def link_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    link: Link,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    shift: bool = False,
    impl: Impl = "auto",
    memory_budget: int | None = None,
    explain: bool = False,
) -> Tensor:
    r"""Link of the cross entropy of `hidden @ weight.T + bias`, never holding all the logits.

    The number that `link_cross_entropy(F.linear(hidden, weight, bias), target, link)` gives.
    Because a row's scale link'(ce) is known as soon as its ce is, the gradients are finished chunk
    by chunk in the forward pass: three matrix products, as for plain cross entropy, for every link.

    Args:
        hidden: (..., D), floating. Half precision: products in half, all per-token numbers in
            float32.
        weight: (V, D), the dtype of `hidden` unless under autocast. A frozen weight (no
            `requires_grad`) saves its product. A DTensor that is sharded over the vocabulary is
            tensor parallelism: `hidden` and `target` are then the same on every rank.
        target: int64, (...), each in [0, V) or `ignore_index`. A label that is neither is an error
            on a CPU, and on CUDA a device-side assertion and a loss of NaN.
        link: The map from cross entropy to loss.
        bias: (V) or None.
        ignore_index: Tokens with this target give 0 and are not counted; on the CPU they are
            dropped before the first product.
        label_smoothing: In [0, 1]; as `link_cross_entropy`.
        token_weight: (...), floating, the shape of `target`: multiplies the loss of each token;
            `mean` divides by its sum over the kept tokens. May be negative, may require grad.
        reduction: "mean" (over kept tokens; NaN where there is none, with zero gradients), "sum" or
            "none" (whose backward pass computes the logits again).
        softcap: Logits become `softcap * tanh(logits / softcap)`; None for as they are.
        shift: True predicts `target[..., t + 1]` from `hidden[..., t, :]`, for causal language
            models; `token_weight` shifts with `target`.
        impl: "chunked", over tokens; "two-pass", over classes, with the weight's gradient written
            once in the weight's dtype (in float32 where `weight.grad_dtype` says so) and a fourth
            product; "torch", all logits at once, differentiable twice; "cce", the package
            cut-cross-entropy (CUDA); "auto" chooses.
        memory_budget: Bytes for the logits that exist at a time; None for 512 tokens' in float32
            (1024 in bfloat16) on a CPU, a quarter of the weight's size on CUDA (256 MiB at least),
            8192 classes' in two passes (256 MiB at most).
        explain: Print to standard error what was chosen, and why.

    Returns:
        A scalar, or for "none" the shape of `target` (with `shift` its last dimension is one
        shorter); float32 for half precision.

    Raises:
        ValueError, TypeError, IndexError: on the wrong shape, dtype, device, option or label.
        ImportError: impl="cce" without the package.
        RuntimeError: on a second derivative, unless impl="torch".
    """
    hidden, weight, bias, shard = local_tensors(hidden, weight, bias)
    return sharded_loss(
        hidden,
        weight,
        target,
        link,
        shard,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        reduction=reduction,
        softcap=softcap,
        shift=shift,
        impl=impl,
        memory_budget=memory_budget,
        explain=explain,
    )


def sharded_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    link: Link,
    shard: Shard,
    *,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    token_weight: Tensor | None,
    reduction: Reduction,
    softcap: float | None,
    shift: bool,
    impl: Impl,
    memory_budget: int | None,
    explain: bool,
) -> Tensor:
    """Return the loss of plain tensors whose weight holds the classes of `shard`."""
    check_linear(
        hidden,
        weight,
        target,
        link,
        bias=bias,
        classes=shard.classes,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        reduction=reduction,
        softcap=softcap,
        shift=shift,
        impl=impl,
        memory_budget=memory_budget,
    )
    if shard.group_name and impl in ("torch", "cce"):
        raise ValueError(
            f"a vocabulary-parallel weight needs impl='chunked' or 'two-pass', got {impl!r}"
        )
    plan = plan_of(
        hidden,
        weight,
        link,
        bias,
        label_smoothing=label_smoothing,
        reduction=reduction,
        impl=impl,
        memory_budget=memory_budget,
        sharded=bool(shard.group_name),
    )
    if explain and not torch.compiler.is_compiling():
        print(plan, file=sys.stderr)
    if shift and target.shape[-1]:
        # Moving the targets instead of slicing hidden saves a copy of it.
        target = F.pad(target[..., 1:], (0, 1), value=ignore_index)
        if token_weight is not None:
            token_weight = F.pad(token_weight[..., 1:], (0, 1))
    shape = target.shape
    flat = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1))
    settings = Settings(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        compute=compute_dtype(hidden),
        rows=plan.rows,
        columns=plan.columns,
        first_class=shard.first_class,
        classes=shard.classes,
        group=shard.group_name,
    )
    if reduction == "none":
        loss = _rows(*flat, link, plan.impl, settings)
        loss = loss.reshape(shape)
        if token_weight is not None:
            loss = loss * token_weight.to(loss.dtype)
        return loss[..., :-1] if shift else loss
    factor, empty = None, None
    work = working_dtype(settings.compute)
    if token_weight is not None:
        factor = token_weight.reshape(-1).to(work)
        factor = factor.masked_fill(flat[3] == ignore_index, 0.0)
    if reduction == "mean":
        factor, empty = _shares(flat[3], factor, ignore_index, work)
    total = _total(*flat, factor, link, plan.impl, settings)
    return total if empty is None else total.masked_fill(empty, torch.nan)


def _has_no_values(hidden: Tensor) -> bool:
    """Whether only shapes are followed: while compiling, and for fake and meta tensors."""
    return torch.compiler.is_compiling() or hidden.is_meta or isinstance(hidden, FakeTensor)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    link: Link,
    impl: str,
    settings: Settings,
) -> Tensor:
    """The loss of each token, 0 where ignored."""
    if impl == "torch":
        return torch_rows(hidden, weight, bias, target, link, settings)
    if impl == "cce":
        check_cce(hidden, bias, settings)
        return cce_rows(hidden, weight, target, link, settings)
    # With smoothing the link acts on every logit, so it goes into the kernel; else it is a function
    # of the kernel's ce, whatever it is.
    inside = link if settings.label_smoothing > 0.0 else CE()
    settings = settings.with_link(inside).with_grads(hidden, weight, bias)
    apply = linear_loss_rows if _has_no_values(hidden) else LossRows.apply
    loss: Tensor = apply(hidden, weight, bias, target, *settings.arguments())[0]
    return loss if inside is link else apply_link(loss, link)


def _total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    link: Link,
    impl: str,
    settings: Settings,
) -> Tensor:
    """The sum of the losses, each times its token's factor."""
    by_row = torch.compiler.is_compiling() and not is_built_in(link)
    if impl != "chunked" or by_row:
        loss = _rows(hidden, weight, bias, target, link, impl, settings)
        return (loss if factor is None else loss * factor).sum()
    settings = settings.with_link(link).with_grads(hidden, weight, bias)
    apply = linear_loss_sum if _has_no_values(hidden) else LossSum.apply
    total: Tensor = apply(hidden, weight, bias, target, factor, *settings.arguments())[0]
    return total


def _shares(
    target: Tensor, factor: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each token's share of the mean, and whether there is nothing to take a mean of.

    As shares of the sum instead of a division after it, so that the gradients come out finished.
    """
    kept = target != ignore_index
    factor = kept.to(dtype) if factor is None else factor.masked_fill(~kept, 0.0)
    count = factor.sum()
    # NaN for an empty mean, as in torch, but gradients of zero: 0 * (1/0) would make them NaN too.
    empty = count == 0
    return factor / count.masked_fill(empty, 1.0), empty


def rooted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    k: float = 3.0,
    m: float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    shift: bool = False,
    impl: Impl = "auto",
    memory_budget: int | None = None,
    explain: bool = False,
) -> Tensor:
    r"""Bounded rooted loss :math:`m\,(1 - p_y^{1/k})` of a linear layer: the **released** form.

    `link_linear_cross_entropy` with `Rooted(k, m)`; for the paper's convex equation pass it
    `RootedConvex(k, m)`.

    Args:
        hidden: As `link_linear_cross_entropy`, and so all that is not named here.
        weight: (V, D).
        target: int64, (...).
        k: Root, > 0; the authors use 5 for language models. inf is cross entropy.
        m: Multiplier, > 0; None means k.
        bias: (V) or None.
        ignore_index: Tokens with this target do not count.
        label_smoothing: In [0, 1].
        token_weight: (...), the weight of each token.
        reduction: "mean", "sum" or "none".
        softcap: Cap of the logits, or None.
        shift: Predict the next token's target.
        impl: "auto", "chunked", "two-pass", "torch" or "cce".
        memory_budget: Bytes for the logits that exist at a time.
        explain: Print what was chosen, and why.
    """
    return link_linear_cross_entropy(
        hidden,
        weight,
        target,
        Rooted(k, m),
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        reduction=reduction,
        softcap=softcap,
        shift=shift,
        impl=impl,
        memory_budget=memory_budget,
        explain=explain,
    )
