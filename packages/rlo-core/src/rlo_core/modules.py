"""The losses as `nn.Module` criteria, each a drop-in for `nn.CrossEntropyLoss`.

The options of a criterion (`k`, `m`, `gamma`, ...) are plain attributes: read them, set them,
schedule them. They travel in the state dict and through pickle.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from rlo_core._arguments import check_reduction, check_smoothing
from rlo_core.functional import (
    IGNORE_INDEX,
    Reduction,
    link_binary_cross_entropy,
    link_cross_entropy,
)
from rlo_core.links import CE, DFT, GCE, Focal, Link, Poly1, Rooted, RootedConvex, _Root
from rlo_core.schedules import Schedule


class LinkLoss(nn.Module):
    """Any link as a criterion, `loss(logits, target)`; see
    `rlo_core.functional.link_cross_entropy`.

    Args:
        link: The map from cross entropy to loss.
        weight: Class weights, (C).
        ignore_index: Index targets with this value do not count.
        label_smoothing: In [0, 1].
        reduction: "mean", "sum" or "none".
    """

    formula: ClassVar[str] = "link(ce)"
    weight: Tensor | None

    def __init__(
        self,
        link: Link,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_smoothing(label_smoothing)
        self.link = link
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as `link_cross_entropy`."""
        return link_cross_entropy(
            logits,
            target,
            self.link,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the link, and the options that are not at their defaults."""
        parts = [str(self.link)]
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.ignore_index != IGNORE_INDEX:
            parts.append(f"ignore_index={self.ignore_index}")
        return ", ".join([*parts, f"reduction={self.reduction!r}"])


class _RootLoss(LinkLoss):
    """A rooted link whose k and m can be moved, by hand or by a schedule."""

    link_type: ClassVar[type[_Root]]

    def __init__(
        self,
        k: float = 3.0,
        m: float | None = None,
        *,
        warmup: float = 0.0,
        schedule: str = "linear",
        k_start: float = float("inf"),
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            self.link_type(k, m),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        self.target_link = self.link
        self.schedule = Schedule(warmup, schedule, k_start)  # type: ignore[arg-type]
        if warmup > 0:
            self.set_progress(0.0)

    @property
    def k(self) -> float:
        """The root in force. Setting it sets the target of the schedule too."""
        return self._root.k

    @k.setter
    def k(self, value: float) -> None:
        self.link = self.target_link = self.link_type(value, self._root.m)

    @property
    def m(self) -> float | None:
        """The multiplier in force, None for k. Setting it sets the target of the schedule too."""
        return self._root.m

    @m.setter
    def m(self, value: float | None) -> None:
        self.link = self.target_link = self.link_type(self._root.k, value)

    @property
    def _root(self) -> _Root:
        assert isinstance(self.link, _Root)
        return self.link

    def set_progress(self, progress: float) -> None:
        """Move k and m to where the schedule has them at `progress` in [0, 1]."""
        if self.schedule.warmup > 0:
            target = self.target_link
            assert isinstance(target, _Root)
            k, m = self.schedule.at(progress, k=target.k, m=target.m)
            if (k, m) != (self.k, self.m):
                self.link = self.link_type(k, m)

    def get_extra_state(self) -> dict[str, Any]:
        """Return k, m and their targets, for the state dict."""
        target = self.target_link
        assert isinstance(target, _Root)
        return {"k": self.k, "m": self.m, "target_k": target.k, "target_m": target.m}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take k, m and their targets from a state dict."""
        self.target_link = self.link_type(state["target_k"], state["target_m"])
        self.link = self.link_type(state["k"], state["m"])


class BinaryLinkLoss(nn.Module):
    """Any link as a binary or multi-label criterion; see `link_binary_cross_entropy`.

    Takes a criterion instead of a link where one is at hand, and then follows its schedule.

    Args:
        link: A link, or a criterion that has one (`RootedLoss(k=3)`).
        weight: Multiplies each element's loss; broadcastable to the logits.
        pos_weight: Multiplies the positive term; broadcastable to the logits.
        reduction: "mean", "sum" or "none".
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        link: Link | LinkLoss,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.criterion = link if isinstance(link, LinkLoss) else LinkLoss(link)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; `target` has the shape of `logits`, in [0, 1]."""
        return link_binary_cross_entropy(
            logits,
            target,
            self.criterion.link,
            weight=self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )


# Written by scripts/write_losses.py from rlo_core.links; change it there.


class CELoss(LinkLoss):
    r"""Cross entropy itself :math:`ce = -\log p_y`, slope 1.

    It is `torch.nn.functional.cross_entropy` under the interface of the family.

    Args:
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = CELoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "ce = -log p"

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            CE(),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class RootedLoss(_RootLoss):
    r"""Bounded rooted logistic loss :math:`m(1-p_y^{1/k})`, slope :math:`(m/k)\,p_y^{1/k}`: `rlo`.

    The **released** form: what the authors' training and LLM code computes. In [0, m], not convex
    in the logits; samples that are already lost count for less. k = 1 has the gradient of dynamic
    fine-tuning, k = inf is cross entropy. The paper's equation, to which its convexity lemmas
    apply, is `RootedConvex`.

    Args:
        k: Root, > 0; 3 in the authors' vision code, 5 for language models. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0. The authors set m = k.
        warmup: Share of the run over which k moves from `k_start` to k; see
            `rlo_core.schedules`.
        schedule: "linear", "cosine", "geometric" or "constant".
        k_start: k at the start of the warmup; inf is cross entropy.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = RootedLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "m (1 - p^(1/k))"
    link_type = Rooted


class RootedConvexLoss(_RootLoss):
    r"""Convex rooted logistic loss :math:`m(p_y^{-1/k}-1)`, slope :math:`(m/k)\,p_y^{-1/k}`.

    The **paper's** equation (2) up to the constant m, and what the authors' GAN code computes.
    Convex in the logits for every k, unbounded; hard samples, mislabelled ones too, count for
    more. Beyond ce/k = 40 (`CONVEX_LINEAR_FROM`) it goes on as its tangent, and the value is held
    at the largest finite number of its dtype.

    Args:
        k: Root, > 0; 2 in the authors' GAN code. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0.
        warmup: Share of the run over which k moves from `k_start` to k; see
            `rlo_core.schedules`.
        schedule: "linear", "cosine", "geometric" or "constant".
        k_start: k at the start of the warmup; inf is cross entropy.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = RootedConvexLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "m (p^(-1/k) - 1)"
    link_type = RootedConvex


class FocalLoss(LinkLoss):
    r"""Focal loss :math:`\alpha(1-p_y)^\gamma ce`.

    Args:
        gamma: Focusing exponent, >= 0; 3 in the RLO authors' baseline.
        alpha: Factor, > 0; 0.25 there.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = FocalLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "alpha (1 - p)^gamma ce"

    def __init__(
        self,
        gamma: float = 3.0,
        alpha: float = 0.25,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            Focal(gamma, alpha),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class GCELoss(LinkLoss):
    r"""Generalised cross entropy :math:`(1-p_y^q)/q`, slope :math:`p_y^q`.

    It is `Rooted` with k = m = 1/q.

    Args:
        q: Exponent, > 0, finite; near 0 it is cross entropy, 1 is the mean absolute error.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = GCELoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "(1 - p^q) / q"

    def __init__(
        self,
        q: float = 0.7,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            GCE(q),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class DFTLoss(LinkLoss):
    r"""Dynamic fine-tuning :math:`\text{sg}(p_y)\,ce`, slope :math:`p_y`.

    The probability in front is a constant to the gradient (sg): that is the definition. Its
    gradient is that of `Rooted` with k = m = 1.

    Args:
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = DFTLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "stopgrad(p) ce"

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            DFT(),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class Poly1Loss(LinkLoss):
    r"""Poly-1 loss :math:`ce + \epsilon(1-p_y)`, slope :math:`1 + \epsilon p_y`.

    Args:
        eps: Weight of the first polynomial term, >= -1.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> criterion = Poly1Loss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    formula = "ce + eps (1 - p)"

    def __init__(
        self,
        eps: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            Poly1(eps),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
