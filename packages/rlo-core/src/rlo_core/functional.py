"""The losses as functions: per-sample cross entropy, then a link, then a reduction.

Semantics are those of `torch.nn.functional.cross_entropy` throughout: the same shapes, targets,
class weights, `ignore_index`, label smoothing and reductions. Half-precision logits are computed in
float32. NaN logits give a NaN loss. Everything here is differentiable to any order, forwards and
backwards and in any nesting of the two, works under `torch.func` and compiles without a graph
break.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_core._arguments import check_binary, check_classes, check_reduction
from rlo_core._compat import transforms_active
from rlo_core._cpu_rows import is_plain, row_loss
from rlo_core._cpu_soft_rows import bounded_root, is_soft_row, soft_row_loss
from rlo_core._cross_entropy import CrossEntropy, HalfCrossEntropy, wide_dtype
from rlo_core._cross_entropy import apply_link as apply_link
from rlo_core.links import CE, DFT, GCE, Focal, Link, Poly1, Rooted, RootedConvex

IGNORE_INDEX = -100
"""Targets with this value do not count, as in torch."""

Reduction = Literal["none", "mean", "sum"]


def link_cross_entropy(
    logits: Tensor,
    target: Tensor,
    link: Link,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Link of the cross entropy, :math:`\sum_c q_c\, w_c\, \text{link}(-\log p_c)`.

    With an index target q is one-hot and this is :math:`w_y\,\text{link}(ce)`. Linear in q, as
    cross entropy is, so label smoothing and mixup are expectations of the hard-target loss.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK). Half precision is computed in float32;
            the gradient is cast back at the end, where float16 may overflow for the convex link.
        target: int64 (or uint8) class indices, (), (N) or (N, d1, ..., dK), each in [0, C) or equal
            to `ignore_index`; or class probabilities, floating, the shape of `logits`.
        link: The map from cross entropy to loss.
        weight: Class weights, (C), multiplying the link's value; `mean` divides by their sum over
            the kept targets (by N for probability targets).
        ignore_index: Index targets with this value give 0 and are not counted. Not for
            probabilities.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target. float32 for half-precision logits. The
        mean over no kept target is NaN, as in torch.

    Raises:
        ValueError, TypeError, IndexError: on the wrong shape, dtype, device, option or label; each
            message says what was expected and what was got. Where torch raises RuntimeError, on
            shapes, dtypes and devices, it is one too.
    """
    plain = weight is None and label_smoothing == 0.0 and is_plain(logits, target)
    if plain and type(link) is not CE:
        check_reduction(reduction)
        return row_loss(logits, target, link, ignore_index, reduction)
    check_classes(logits, target, weight, ignore_index, label_smoothing, reduction)
    if target.dtype == torch.uint8:
        target = target.long()
    # torch's own cannot smooth under vmap.
    composed = label_smoothing > 0.0 and transforms_active()
    if type(link) is CE and not composed and logits.dtype not in (torch.float16, torch.bfloat16):
        return F.cross_entropy(
            logits,
            target,
            weight=None if weight is None else weight.to(logits.dtype),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    root = bounded_root(link) if weight is None else None
    if root is not None and (label_smoothing > 0.0 or target.is_floating_point()):
        fast = _soft_rows(logits, target, link, root, ignore_index, label_smoothing, reduction)
        if fast is not None:
            return fast
    if target.is_floating_point():
        return _soft(logits, target, link, weight, label_smoothing, reduction)
    return _hard(logits, target, link, weight, ignore_index, label_smoothing, reduction)


def _soft_rows(
    logits: Tensor,
    target: Tensor,
    link: Link,
    root: tuple[float, float],
    ignore_index: int,
    smoothing: float,
    reduction: Reduction,
) -> Tensor | None:
    """Return the loss in one pass where that is possible, else None."""
    if not is_soft_row(logits, target):
        return None

    def composed(z: Tensor) -> Tensor:
        if target.is_floating_point():
            return _soft(z, target, link, None, smoothing, reduction)
        return _hard(z, target, link, None, ignore_index, smoothing, reduction)

    return soft_row_loss(
        logits,
        target,
        root,
        ignore_index=ignore_index,
        smoothing=smoothing,
        reduction=reduction,
        composed=composed,
    )


def _hard(
    logits: Tensor,
    target: Tensor,
    link: Link,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: Reduction,
) -> Tensor:
    half = logits.dtype in (torch.float16, torch.bfloat16)
    compiling = torch.compiler.is_compiling()
    kept = target != ignore_index
    class_dim = 1 if logits.dim() > 1 else 0
    safe = target.masked_fill(~kept, 0)
    if smoothing > 0.0:
        log_p = F.log_softmax(logits, class_dim, dtype=wide_dtype(logits))
        ce = -log_p.gather(class_dim, safe.unsqueeze(class_dim)).squeeze(class_dim)
    elif half or compiling:
        function = CrossEntropy if compiling else HalfCrossEntropy
        ce = function.apply(logits.movedim(class_dim, -1), safe)
    else:
        ce = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    # Anything but 0, where a link may have an infinite slope, whose derivative would be 0 * inf.
    loss = apply_link(ce.masked_fill(~kept, 1.0), link)
    if weight is not None:
        weight = weight.to(loss.dtype)
        # index_select and not weight[safe], which reads a lone index and so fails under vmap.
        counted = weight.index_select(0, safe.reshape(-1)).reshape(safe.shape)
        counted = counted.masked_fill(~kept, 0.0)
        loss = loss * counted
    if smoothing > 0.0:
        spread = apply_link(-log_p, link).movedim(class_dim, -1)
        spread = spread.mean(-1) if weight is None else (spread * weight).mean(-1)
        loss = loss * (1.0 - smoothing) + spread * smoothing
    loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = kept.sum() if weight is None else counted.sum()
    # NaN for an empty mean, as in torch, whose gradients of every order are zero: not 0 * (1/0).
    empty = count == 0
    return (loss.sum() / count.masked_fill(empty, 1)).masked_fill(empty, torch.nan)


def _soft(
    logits: Tensor,
    target: Tensor,
    link: Link,
    weight: Tensor | None,
    smoothing: float,
    reduction: Reduction,
) -> Tensor:
    class_dim = 1 if logits.dim() > 1 else 0
    log_p = F.log_softmax(logits, class_dim, dtype=wide_dtype(logits))
    target = target.to(log_p.dtype)
    if smoothing > 0.0:
        target = target * (1.0 - smoothing) + smoothing / logits.shape[class_dim]
    terms = (apply_link(-log_p, link) * target).movedim(class_dim, -1)
    if weight is not None:
        terms = terms * weight.to(terms.dtype)
    loss = terms.sum(-1)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / loss.numel()


def link_binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    link: Link,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Each logit a two-class problem, :math:`t\,w_+ link(sp(-x)) + (1-t)\,link(sp(x))`.

    :math:`sp` is softplus, so a target of 1 gives link(-log sigmoid(x)). Linear in a fractional
    target. For multi-label classification, and for GANs: `RootedConvex` of softplus(-logit).
    Semantics of `torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        logits: Floating, any shape.
        target: Floating, the shape of `logits`, in [0, 1].
        link: The map from cross entropy to loss.
        weight: Multiplies each element's loss; broadcastable to `logits`.
        pos_weight: Multiplies the positive term; broadcastable to `logits`.
        reduction: "mean" (over all elements), "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of `logits`; float32 for half-precision logits.

    Raises:
        ValueError, TypeError: on the wrong shape, dtype, device or option.
    """
    check_binary(logits, target, reduction)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = target.to(x.dtype)
    # -logsigmoid(x) is softplus(-x) without softplus's linear cut at 20.
    positive = apply_link(-F.logsigmoid(x), link)
    negative = apply_link(-F.logsigmoid(-x), link)
    if pos_weight is not None:
        positive = positive * pos_weight
    loss = target * positive + (1.0 - target) * negative
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


# Written by scripts/write_losses.py from rlo_core.links; change it there.


def rooted_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: float = 3.0,
    m: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Bounded rooted logistic loss :math:`m(1-p_y^{1/k})`, slope :math:`(m/k)\,p_y^{1/k}`: `rlo`.

    The **released** form: what the authors' training and LLM code computes. In [0, m], not convex
    in the logits; samples that are already lost count for less. k = 1 has the gradient of dynamic
    fine-tuning, k = inf is cross entropy. The paper's equation, to which its convexity lemmas
    apply, is `RootedConvex`.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        k: Root, > 0; 3 in the authors' vision code, 5 for language models. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0. The authors set m = k.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = rooted_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        0.6882

    Source: Wang et al., AISTATS 2025, released code (`k`, `m` there too).
    """
    return link_cross_entropy(
        logits,
        target,
        Rooted(k, m),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def binary_rooted_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: float = 3.0,
    m: float | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""`rooted_loss` of each logit's own two classes.

    `link_binary_cross_entropy` says what the arguments are and what is returned; the
    options are those of `rooted_loss`.
    """
    return link_binary_cross_entropy(
        logits,
        target,
        Rooted(k, m),
        weight=weight,
        pos_weight=pos_weight,
        reduction=reduction,
    )


def rooted_convex_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: float = 3.0,
    m: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Convex rooted logistic loss :math:`m(p_y^{-1/k}-1)`, slope :math:`(m/k)\,p_y^{-1/k}`.

    The **paper's** equation (2) up to the constant m, and what the authors' GAN code computes.
    Convex in the logits for every k, unbounded; hard samples, mislabelled ones too, count for
    more. Beyond ce/k = 40 (`CONVEX_LINEAR_FROM`) it goes on as its tangent, and the value is held
    at the largest finite number of its dtype.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        k: Root, > 0; 2 in the authors' GAN code. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = rooted_convex_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        1.1032

    Source: Wang et al., AISTATS 2025, the definition of RLO.
    """
    return link_cross_entropy(
        logits,
        target,
        RootedConvex(k, m),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def binary_rooted_convex_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: float = 3.0,
    m: float | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""`rooted_convex_loss` of each logit's own two classes.

    `link_binary_cross_entropy` says what the arguments are and what is returned; the
    options are those of `rooted_convex_loss`.
    """
    return link_binary_cross_entropy(
        logits,
        target,
        RootedConvex(k, m),
        weight=weight,
        pos_weight=pos_weight,
        reduction=reduction,
    )


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 3.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal loss :math:`\alpha(1-p_y)^\gamma ce`.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        gamma: Focusing exponent, >= 0; 3 in the RLO authors' baseline.
        alpha: Factor, > 0; 0.25 there.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = focal_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        0.095

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. (5).
    """
    return link_cross_entropy(
        logits,
        target,
        Focal(gamma, alpha),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def gce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Generalised cross entropy :math:`(1-p_y^q)/q`, slope :math:`p_y^q`.

    It is `Rooted` with k = m = 1/q.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        q: Exponent, > 0, finite; near 0 it is cross entropy, 1 is the mean absolute error.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = gce_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        0.5532

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss", 2018, eq. (6).
    """
    return link_cross_entropy(
        logits,
        target,
        GCE(q),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def dft_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dynamic fine-tuning :math:`\text{sg}(p_y)\,ce`, slope :math:`p_y`.

    The probability in front is a constant to the gradient (sg): that is the definition. Its
    gradient is that of `Rooted` with k = m = 1.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = dft_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        0.2361

    Source: Wu et al., "On the Generalization of SFT", 2025, eq. (9).
    """
    return link_cross_entropy(
        logits,
        target,
        DFT(),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def poly1_loss(
    logits: Tensor,
    target: Tensor,
    *,
    eps: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Poly-1 loss :math:`ce + \epsilon(1-p_y)`, slope :math:`1 + \epsilon p_y`.

    Args:
        logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).
        target: Class indices or class probabilities, as `link_cross_entropy` takes them.
        eps: Weight of the first polynomial term, >= -1.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" the shape of an index target; float32 for half
        precision.

    Raises:
        ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that
            is not in its range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> loss = poly1_loss(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        1.3328

    Source: Leng et al., "PolyLoss", 2022, eq. (6).
    """
    return link_cross_entropy(
        logits,
        target,
        Poly1(eps),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
