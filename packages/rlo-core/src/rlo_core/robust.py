r"""Losses that others proposed for wrong labels and for calibration, to be compared with.

They are criteria under the registry's names (`agce`, `sce`, `anl`, `jal`, `smooth-ce`,
`tempered-ce`) with the contract of `rlo_core.functional.link_cross_entropy`. Two are functions of
cross entropy, so links: they have fused heads, binary forms and boosting too. The others look at
the whole row of logits. `ELRLoss` needs to know which sample is which, so it is no spec: a training
loop of your own hands it the indices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlo_core._arguments import check_classes, check_reduction, check_smoothing
from rlo_core.functional import IGNORE_INDEX, Reduction
from rlo_core.links import Link, _finite, _positive
from rlo_core.modules import LinkLoss

__all__ = [
    "AGCELoss",
    "ANLLoss",
    "ELRLoss",
    "JALLoss",
    "SCELoss",
    "SmoothedCELoss",
    "TemperedCELoss",
]


@dataclass(frozen=True)
class AGCE(Link):
    r"""Asymmetric generalised cross entropy :math:`((a+1)^q-(a+p_y)^q)/q`.

    Slope :math:`p_y (a+p_y)^{q-1}`. At a = 0 it is `rlo_core.links.GCE`.

    Args:
        a: Offset, > 0; 0.6 in the authors' runs on CIFAR-10.
        q: Exponent, > 0; 0.6 there. Asymmetric for every q > 1, and for q <= 1 if a is large.

    Source: Zhou et al., "Asymmetric Loss Functions for Learning with Noisy Labels", 2021, eq. (10).
    """

    formula = "((a+1)^q - (a+p)^q) / q"
    a: float = 0.6
    q: float = 0.6

    def __post_init__(self) -> None:
        for name in ("a", "q"):
            _positive(name, getattr(self, name))
            _finite(name, getattr(self, name))

    def value(self, ce: Tensor) -> Tensor:
        # (a+p)/(a+1) = 1 + (p-1)/(a+1): small losses keep their digits.
        fallen = torch.log1p(torch.expm1(-ce) / (1.0 + self.a))
        value: Tensor = torch.expm1(fallen * self.q) * (-((1.0 + self.a) ** self.q) / self.q)
        return value

    def slope(self, ce: Tensor) -> Tensor:
        p = torch.exp(-ce)
        slope: Tensor = p * (p + self.a) ** (self.q - 1.0)
        return slope


@dataclass(frozen=True)
class SCE(Link):
    r"""Symmetric cross entropy :math:`\alpha\,ce+\beta\,rce`, with :math:`rce=4(1-p_y)`.

    Reverse cross entropy is :math:`-\sum_c p_c\log y_c` with log 0 put at -4. Slope
    :math:`\alpha+4\beta p_y`: a poly-1 loss.

    Args:
        alpha: Weight of cross entropy, >= 0; 0.1 in the authors' runs on CIFAR-10.
        beta: Weight of reverse cross entropy, >= 0; 1 there.

    Source: Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", 2019,
    eq. (7), A = -4.
    """

    formula = "alpha ce + 4 beta (1 - p)"
    alpha: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            _at_least_zero(name, getattr(self, name))
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta must not both be 0")

    def value(self, ce: Tensor) -> Tensor:
        return ce * self.alpha - torch.expm1(-ce) * (4.0 * self.beta)

    def slope(self, ce: Tensor) -> Tensor:
        return torch.exp(-ce) * (4.0 * self.beta) + self.alpha


def _at_least_zero(name: str, value: float) -> None:
    _finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


class AGCELoss(LinkLoss):
    """`AGCE` as a criterion: a, q, and the common options of `LinkLoss`."""

    formula = AGCE.formula

    def __init__(
        self,
        a: float = 0.6,
        q: float = 0.6,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            AGCE(a, q),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class SCELoss(LinkLoss):
    """`SCE` as a criterion: alpha, beta, and the common options of `LinkLoss`."""

    formula = SCE.formula

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            SCE(alpha, beta),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class _ClassTableLoss(nn.Module, ABC):
    """A loss from a table (N, C): what each row would cost if its label were class c.

    Linear in the target, so smoothing and mixed targets are expectations over hard labels.
    """

    formula: ClassVar[str] = ""
    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: Reduction,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_smoothing(label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction

    @abstractmethod
    def table(self, logits: Tensor) -> Tensor:
        """Return the costs, (N, C), for logits (N, C), float32 or wider."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as `rlo_core.functional.link_cross_entropy`."""
        smoothing = self.label_smoothing
        check_classes(logits, target, self.weight, self.ignore_index, smoothing, self.reduction)
        soft = target.is_floating_point()
        classes = logits.shape[0 if logits.dim() == 1 else 1]
        shape = target.shape[:1] + target.shape[2:] if soft and logits.dim() > 1 else target.shape
        shape = torch.Size() if logits.dim() == 1 else shape
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        rows = wide.movedim(1, -1).reshape(-1, classes) if logits.dim() > 1 else wide[None]
        costs = self.table(rows)
        kept: Tensor | None = None
        if soft:
            q = target.movedim(1, -1).reshape(-1, classes) if logits.dim() > 1 else target[None]
            q = q.to(costs.dtype)
        else:
            labels = target.reshape(-1).long()
            kept = labels != self.ignore_index
            labels = labels.where(kept, 0)
            q = F.one_hot(labels, classes).to(costs.dtype)
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / classes
        share = torch.ones_like(costs[:, 0])
        if self.weight is not None:
            w = self.weight.to(costs.dtype)
            costs = costs * w
            share = share if kept is None else w[labels]
        each = (q * costs).sum(-1)
        if kept is not None:
            each, share = each.where(kept, 0.0), share.where(kept, 0.0)
        if self.reduction == "none":
            return each.reshape(shape)
        return each.sum() if self.reduction == "sum" else each.sum() / share.sum()


class SmoothedCELoss(_ClassTableLoss):
    """Cross entropy with smoothed labels, as torch has them.

    Args:
        eps: The share of the target spread evenly over the classes, in [0, 1].
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        reduction: "mean", "sum" or "none".

    Source: Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7.
    """

    formula = "(1 - eps) ce + eps mean of -log p"

    def __init__(
        self,
        eps: float = 0.1,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        if not 0.0 <= eps <= 1.0:
            raise ValueError(f"eps must be in [0, 1], got {eps}")
        super().__init__(
            weight=weight, ignore_index=ignore_index, label_smoothing=eps, reduction=reduction
        )

    def table(self, logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1)


class ANLLoss(_ClassTableLoss):
    r"""Active negative loss, ANL-CE: :math:`\alpha\,nce+\beta\,nnce`.

    With :math:`nce=\frac{\log p_y}{\sum_c\log p_c}` (active) and
    :math:`nnce=1-\frac{A+\log p_y}{\sum_c(A+\log p_c)}` (negative), p held at 1e-7 from below and
    :math:`A=-\log 10^{-7}`. The authors add an L1 penalty on the network's weights (5e-5), which is
    the optimiser's to give.

    Args:
        alpha: Weight of the active part, >= 0; 5 in the authors' runs on CIFAR-10.
        beta: Weight of the negative part, >= 0; 5 there.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Source: Ye et al., "Active Negative Loss", arXiv 2412.02373, eqs. (10) and (13).
    """

    formula = "alpha nce + beta nnce"
    SMALLEST = 1e-7

    def __init__(
        self,
        alpha: float = 5.0,
        beta: float = 5.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        _at_least_zero("alpha", alpha)
        _at_least_zero("beta", beta)
        self.alpha, self.beta = alpha, beta

    def table(self, logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        flipped = log_p.clamp(min=math.log(self.SMALLEST)) - math.log(self.SMALLEST)
        negative = 1.0 - flipped / flipped.sum(-1, keepdim=True)
        return _normalised(log_p) * self.alpha + negative * self.beta


class JALLoss(_ClassTableLoss):
    r"""Joint asymmetric loss, JAL-CE: :math:`\alpha\,nce+\beta\,amse`.

    With :math:`nce=\frac{\log p_y}{\sum_c\log p_c}` and the asymmetric mean square error
    :math:`amse=\frac{1}{C}\|p-a\,e_y\|_2^2`.

    Args:
        alpha: Weight of the active part, >= 0; 1 in the authors' runs on CIFAR-10.
        beta: Weight of the asymmetric part, >= 0; 1 there.
        a: How far beyond a corner of the simplex the label lies, > 0; 30 there.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Source: Wang et al., "Joint Asymmetric Loss for Learning with Noisy Labels", arXiv 2507.17692;
    released code, `NCEandAMSE`.
    """

    formula = "alpha nce + beta |p - a y|^2 / C"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        a: float = 30.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        _at_least_zero("alpha", alpha)
        _at_least_zero("beta", beta)
        _positive("a", a)
        self.alpha, self.beta, self.a = alpha, beta, a

    def table(self, logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        square = p.square().sum(-1, keepdim=True) - p * (2.0 * self.a) + self.a**2
        return _normalised(log_p) * self.alpha + square * (self.beta / p.shape[-1])


def _normalised(log_p: Tensor) -> Tensor:
    return log_p / log_p.sum(-1, keepdim=True)


class TemperedCELoss(_ClassTableLoss):
    r"""Cross entropy at a temperature, :math:`-t\log\text{softmax}(z/t)_y`.

    The factor t keeps the gradient of a wrong sample as large as that of cross entropy. The network
    that is used afterwards has the logits z, without the temperature.

    Args:
        t: Temperature, > 0; 1 is cross entropy. Below 1 a fit needs smaller margins, so that z is
            less confident; above 1 it needs larger ones.
        weight: Class weights, (C), multiplying the loss.
        ignore_index: Index targets with this value give 0 and are not counted.
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Source: Agarwala et al., "Temperature check: theory and practice for training models with
    softmax-cross-entropy losses", 2020 (inverse temperature 1/t).
    """

    formula = "-t log softmax(z / t)_y"

    def __init__(
        self,
        t: float = 0.5,
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        _positive("t", t)
        _finite("t", t)
        self.t = t

    def table(self, logits: Tensor) -> Tensor:
        return (logits / self.t).log_softmax(-1) * -self.t


class ELRLoss(nn.Module):
    r"""Early-learning regularisation: :math:`ce+\lambda\log(1-\langle p_i,t_i\rangle)`.

    :math:`t_i\leftarrow\beta t_i+(1-\beta)p_i` is a running mean of what the network thought of
    sample i, kept for every sample, without gradient. So a step must say which samples it sees.

    Args:
        samples: How many training samples there are.
        classes: C.
        lam: Strength of the regularisation, >= 0; 3 in the authors' runs on CIFAR-10.
        beta: Share of the running mean that stays, in [0, 1); 0.7 there.

    Example:
        >>> import torch
        >>> criterion = ELRLoss(100, 4)
        >>> index = torch.tensor([3, 17])
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]), index).shape
        torch.Size([])

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", 2020,
    eqs. (6) and (9).
    """

    targets: Tensor

    def __init__(self, samples: int, classes: int, *, lam: float = 3.0, beta: float = 0.7) -> None:
        super().__init__()
        _at_least_zero("lam", lam)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        self.lam, self.beta = lam, beta
        self.register_buffer("targets", torch.zeros(samples, classes))

    def forward(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Return the mean loss of samples `index`, (N), with logits (N, C) and labels (N)."""
        p = logits.softmax(-1).clamp(1e-4, 1.0 - 1e-4)
        with torch.no_grad():
            shares = p / p.sum(-1, keepdim=True)
            now = self.targets[index] * self.beta + shares * (1.0 - self.beta)
            self.targets[index] = now
        agreement = (p * now).sum(-1)
        return F.cross_entropy(logits, target) + self.lam * torch.log1p(-agreement).mean()
