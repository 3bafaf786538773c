r"""The two rooted links on NumPy arrays, with the second derivative that Newton's method needs.

The same functions of per-sample cross entropy as `rlo_core.links`, which are torch's; here without
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Form = Literal["convex", "bounded"]
FORMS: tuple[str, ...] = get_args(Form)
CONVEX_LINEAR_FROM = 40.0
"""As in `rlo_core.links`: beyond this ce/k the convex link goes on as its tangent."""


@dataclass(frozen=True)
class Root:
    r"""Convex :math:`m(e^{ce/k}-1)` or bounded :math:`m(1-e^{-ce/k})`; k = inf is cross entropy.

    Args:
        k: Root, in (0, inf].
        m: Multiplier, > 0; None means k, a slope of 1 at ce = 0. It has to be None where k is inf.
        form: "convex" is the paper's equation, "bounded" the released training code.
    """

    k: float = 3.0
    m: float | None = None
    form: Form = "convex"

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k must be positive, got {self.k}")
        if self.form not in FORMS:
            raise ValueError(f"form must be 'convex' or 'bounded', got {self.form!r}")
        if self.m is None:
            return
        if not 0 < self.m < math.inf:
            raise ValueError(f"m must be positive and finite, got {self.m}")
        if math.isinf(self.k):
            raise ValueError(f"m must be left out when k is inf, got {self.m}")

    @property
    def scale(self) -> float:
        """m/k, the slope at ce = 0."""
        return 1.0 if self.m is None else self.m / self.k

    def derivatives(self, ce: Array) -> tuple[Array, Array, Array | float]:
        """Return value, first and second derivative at `ce` (nats, any shape, >= 0)."""
        if math.isinf(self.k):
            return ce * self.scale, np.full_like(ce, self.scale), 0.0
        rate = 1.0 / self.k
        if self.form == "bounded":
            below = np.expm1(ce * -rate)  # in (-1, 0]: value and slope from one transcendental
            slope = (below + 1.0) * self.scale
            # 1 + expm1 loses the digits of a slope below 1e-16 of the scale; none of them counts in
            # a sum.
            return below * (-self.scale * self.k), slope, slope * -rate
        x = ce * rate
        above = np.expm1(np.minimum(x, CONVEX_LINEAR_FROM))
        slope = (above + 1.0) * self.scale
        curvature = slope * rate
        if x.size and x.max() > CONVEX_LINEAR_FROM:
            beyond = x > CONVEX_LINEAR_FROM
            above[beyond] += (x[beyond] - CONVEX_LINEAR_FROM) * math.exp(CONVEX_LINEAR_FROM)
            curvature[beyond] = 0.0
        return above * (self.scale * self.k), slope, curvature
