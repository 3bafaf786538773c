r"""Links: every loss of the family is a function of one number per sample, its cross entropy.

With logits :math:`z`, target :math:`y` and :math:`ce = \log\sum_c e^{z_c} - z_y = -\log p_y`, each
loss is :math:`\text{link}(ce)`, and its gradient is that of cross entropy scaled by
:math:`\text{link}'(ce)`. So whatever can compute per-sample cross entropy can train all of them.

A link computes in the dtype that it is given. Callers pass float32 or wider: half precision has too
few digits for `expm1` of a small argument, and `rlo_core.functional` casts up before it calls.
Every built-in value and slope is finite for every finite `ce` in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

CONVEX_LINEAR_FROM = 40.0
"""`ce/k` beyond which the convex link goes on as its tangent. The slope there, e^40 = 2.4e17, has a
square that is finite in float32, so Adam's second moment does not overflow either."""


class Link(ABC):
    """A differentiable, increasing map from per-sample cross entropy to loss, zero at zero.

    Subclass it with `value` and `slope` to get all of the suite: reductions, soft targets, binary
    and fused linear losses, schedules and hosts.

    A link of this package names itself too, and gets its function, its criterion and its place in
    the registry from that: `scripts/write_losses.py` writes them.

    Attributes:
        spec: The name in a spec string, "" for a link that has none.
        function: The name of its function in `rlo_core.functional`.
        criterion: The name of its class in `rlo_core.modules`.
        formula: The loss in plain text, as `rlo losses` prints it.
    """

    spec: ClassVar[str] = ""
    function: ClassVar[str] = ""
    criterion: ClassVar[str] = ""
    formula: ClassVar[str] = "link(ce)"

    def numbers(self) -> tuple[float, ...]:
        """Return the options as at most two numbers, for an operator that takes no objects."""
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    @classmethod
    def from_numbers(cls, *numbers: float) -> Link:
        """Return the link that has these `numbers`."""
        return cls(*numbers)

    @abstractmethod
    def value(self, ce: Tensor) -> Tensor:
        """Return the loss of each sample, same shape and dtype as `ce` (nats, >= 0)."""

    @abstractmethod
    def slope(self, ce: Tensor) -> Tensor:
        """Return d value / d ce in closed form, same shape and dtype as `ce`."""


def _positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in (0, inf]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


@dataclass(frozen=True)
class CE(Link):
    r"""Cross entropy itself: value :math:`ce = -\log p_y`, slope 1.

    It is `torch.nn.functional.cross_entropy` under the interface of the family.
    """

    spec = "ce"
    criterion = "CELoss"
    formula = "ce = -log p"

    def value(self, ce: Tensor) -> Tensor:
        return ce

    def slope(self, ce: Tensor) -> Tensor:
        return torch.ones_like(ce)


@dataclass(frozen=True)
class _Root(Link):
    """What the two rooted forms share: the root `k` in (0, inf] and the multiplier `m` (None: k).

    `k=inf` is cross entropy, and then `m` has to be None: no finite multiplier gives it a scale.
    """

    k: float = 3.0
    m: float | None = None

    def __post_init__(self) -> None:
        _positive("k", self.k)
        if self.m is not None:
            _positive("m", self.m)
            if math.isinf(self.m):
                raise ValueError("m must be finite, got inf; leave it out for m = k")
            if self.k == math.inf:  # not isinf: under torch.compile k is symbolic
                raise ValueError(f"m must be left out when k is inf, got {self.m}")

    @property
    def scale(self) -> float:
        """m/k, the slope at ce = 0."""
        return 1.0 if self.m is None else self.m / self.k

    @property
    def multiplier(self) -> float:
        """The m in force: k where m was left out."""
        return self.k if self.m is None else self.m

    def numbers(self) -> tuple[float, ...]:
        return self.k, self.multiplier

    @classmethod
    def from_numbers(cls, *numbers: float) -> Link:
        k, m = numbers
        return cls(k, None if m == k else m)


@dataclass(frozen=True)
class Rooted(_Root):
    r"""Bounded rooted logistic loss :math:`m(1-p_y^{1/k})`, slope :math:`(m/k)\,p_y^{1/k}`: `rlo`.

    The **released** form: what the authors' training and LLM code computes. In [0, m], not convex
    in the logits; samples that are already lost count for less. k = 1 has the gradient of dynamic
    fine-tuning, k = inf is cross entropy. The paper's equation, to which its convexity lemmas
    apply, is `RootedConvex`.

    Args:
        k: Root, > 0; 3 in the authors' vision code, 5 for language models. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0. The authors set m = k.

    Source: Wang et al., AISTATS 2025, released code (`k`, `m` there too).
    """

    spec = "rlo"
    function = "rooted_loss"
    criterion = "RootedLoss"
    formula = "m (1 - p^(1/k))"

    def value(self, ce: Tensor) -> Tensor:
        if self.k == math.inf:  # not isinf: under torch.compile k is symbolic
            return ce * self.scale
        return torch.expm1(ce * (-1.0 / self.k)) * -self.multiplier

    def slope(self, ce: Tensor) -> Tensor:
        slope = torch.exp(ce * (-1.0 / self.k))
        return slope if self.m is None else slope * self.scale


@dataclass(frozen=True)
class RootedConvex(_Root):
    r"""Convex rooted logistic loss :math:`m(p_y^{-1/k}-1)`, slope :math:`(m/k)\,p_y^{-1/k}`.

    The **paper's** equation (2) up to the constant m, and what the authors' GAN code computes.
    Convex in the logits for every k, unbounded; hard samples, mislabelled ones too, count for
    more. Beyond ce/k = 40 (`CONVEX_LINEAR_FROM`) it goes on as its tangent, and the value is held
    at the largest finite number of its dtype.

    Args:
        k: Root, > 0; 2 in the authors' GAN code. inf is cross entropy.
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0.

    Source: Wang et al., AISTATS 2025, the definition of RLO.
    """

    spec = "rlo-convex"
    function = "rooted_convex_loss"
    criterion = "RootedConvexLoss"
    formula = "m (p^(-1/k) - 1)"

    def value(self, ce: Tensor) -> Tensor:
        if self.k == math.inf:  # not isinf: under torch.compile k is symbolic
            return ce * self.scale
        x = ce * (1.0 / self.k)
        near = x.clamp(max=CONVEX_LINEAR_FROM)
        value = torch.add(torch.expm1(near), x - near, alpha=math.exp(CONVEX_LINEAR_FROM))
        return (value * self.multiplier).clamp(max=torch.finfo(ce.dtype).max)

    def slope(self, ce: Tensor) -> Tensor:
        slope = torch.exp((ce * (1.0 / self.k)).clamp(max=CONVEX_LINEAR_FROM))
        return slope if self.m is None else slope * self.scale


@dataclass(frozen=True)
class Focal(Link):
    r"""Focal loss :math:`\alpha(1-p_y)^\gamma ce`.

    Args:
        gamma: Focusing exponent, >= 0; 3 in the RLO authors' baseline.
        alpha: Factor, > 0; 0.25 there.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. (5).
    """

    spec = "focal"
    function = "focal_loss"
    criterion = "FocalLoss"
    formula = "alpha (1 - p)^gamma ce"
    gamma: float = 3.0
    alpha: float = 0.25

    def __post_init__(self) -> None:
        _finite("gamma", self.gamma)
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")
        _positive("alpha", self.alpha)
        _finite("alpha", self.alpha)

    def value(self, ce: Tensor) -> Tensor:
        return (-torch.expm1(-ce)) ** self.gamma * ce * self.alpha

    def slope(self, ce: Tensor) -> Tensor:
        miss = -torch.expm1(-ce)
        # ce/miss -> 1 as ce -> 0: written so, a gamma below 1 has no 0 * inf there.
        ratio = torch.where(ce == 0, torch.ones_like(ce), ce / miss.where(ce != 0, 1.0))
        # ce e^-ce is 0 * inf for nothing finite; e^-ce underflows first.
        return miss**self.gamma * (1.0 + self.gamma * torch.exp(-ce) * ratio) * self.alpha


@dataclass(frozen=True)
class GCE(Link):
    r"""Generalised cross entropy :math:`(1-p_y^q)/q`, slope :math:`p_y^q`.

    It is `Rooted` with k = m = 1/q.

    Args:
        q: Exponent, > 0, finite; near 0 it is cross entropy, 1 is the mean absolute error.

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss", 2018, eq. (6).
    """

    spec = "gce"
    function = "gce_loss"
    criterion = "GCELoss"
    formula = "(1 - p^q) / q"
    q: float = 0.7

    def __post_init__(self) -> None:
        _positive("q", self.q)
        _finite("q", self.q)

    def value(self, ce: Tensor) -> Tensor:
        return torch.expm1(ce * -self.q) * (-1.0 / self.q)

    def slope(self, ce: Tensor) -> Tensor:
        return torch.exp(ce * -self.q)


@dataclass(frozen=True)
class DFT(Link):
    r"""Dynamic fine-tuning :math:`\text{sg}(p_y)\,ce`, slope :math:`p_y`.

    The probability in front is a constant to the gradient (sg): that is the definition. Its
    gradient is that of `Rooted` with k = m = 1.

    Source: Wu et al., "On the Generalization of SFT", 2025, eq. (9).
    """

    spec = "dft"
    function = "dft_loss"
    criterion = "DFTLoss"
    formula = "stopgrad(p) ce"

    def value(self, ce: Tensor) -> Tensor:
        return torch.exp(-ce) * ce

    def slope(self, ce: Tensor) -> Tensor:
        return torch.exp(-ce)


@dataclass(frozen=True)
class Poly1(Link):
    r"""Poly-1 loss :math:`ce + \epsilon(1-p_y)`, slope :math:`1 + \epsilon p_y`.

    Args:
        eps: Weight of the first polynomial term, >= -1.

    Source: Leng et al., "PolyLoss", 2022, eq. (6).
    """

    spec = "poly1"
    function = "poly1_loss"
    criterion = "Poly1Loss"
    formula = "ce + eps (1 - p)"
    eps: float = 1.0

    def __post_init__(self) -> None:
        _finite("eps", self.eps)
        if self.eps < -1:
            raise ValueError(f"eps must be at least -1 for the loss to increase, got {self.eps}")

    def value(self, ce: Tensor) -> Tensor:
        return ce - torch.expm1(-ce) * self.eps

    def slope(self, ce: Tensor) -> Tensor:
        # expm1, so that eps = -1, where the slope is 1 - p, keeps its digits near ce = 0.
        return torch.expm1(-ce) * self.eps + (1.0 + self.eps)


BUILT_IN: dict[str, type[Link]] = {
    link.spec: link for link in (CE, Rooted, RootedConvex, Focal, GCE, DFT, Poly1)
}
"""The links of this package by their names in a spec string."""
