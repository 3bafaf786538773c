r"""`k` and `m` as functions of progress: a run can start as cross entropy and end as a rooted loss.

A schedule moves the two numbers in which both rooted links are smooth at k = inf: the rate
:math:`r = 1/k` (0 is cross entropy) and the scale :math:`s = m/k` (the slope at ce = 0). Hosts make
one call a step, `set_progress(criterion, step / steps)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

Shape = Literal["constant", "linear", "cosine", "geometric"]
SHAPES: tuple[str, ...] = get_args(Shape)


@dataclass(frozen=True)
class Schedule:
    """From `k_start` at progress 0 to the loss's own k (and m) at progress `warmup`, then constant.

    Args:
        warmup: Share of the run over which k moves, in [0, 1]. 0 is no schedule.
        shape: "linear" and "cosine" in 1/k, "geometric" in k, "constant" stays at `k_start` for the
            warmup and then jumps.
        k_start: The k at the start, > 0; inf is cross entropy. "geometric" needs it finite.
    """

    warmup: float = 0.0
    shape: Shape = "linear"
    k_start: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}")
        if self.shape not in SHAPES:
            raise ValueError(f"schedule must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if not self.k_start > 0:
            raise ValueError(f"k_start must be positive, got {self.k_start}")
        if self.shape == "geometric" and math.isinf(self.k_start):
            raise ValueError("k_start must be finite for a geometric schedule, got inf")

    def at(self, progress: float, *, k: float, m: float | None) -> tuple[float, float | None]:
        """Return the (k, m) in force at `progress` in [0, 1] for a loss that ends at `k`, `m`."""
        if not 0.0 <= progress <= 1.0 + 1e-6:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        if progress >= self.warmup:
            return k, m
        done = progress / self.warmup
        start, end = 1.0 / self.k_start, 1.0 / k
        if self.shape == "constant":
            part, rate = 0.0, start
        elif self.shape == "geometric":
            part, rate = done, start * (end / start) ** done
        else:
            part = done if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
            rate = start + (end - start) * part
        now = math.inf if rate == 0.0 else 1.0 / rate
        if m is None or math.isinf(now):
            return now, None
        return now, now * (1.0 + (m / k - 1.0) * part)


def set_progress(criterion: nn.Module, progress: float) -> None:
    """Tell a criterion, and every module inside it, how far the run is.

    Does nothing for losses without a schedule, so a host calls it always, once per step.

    Args:
        criterion: Any module; those with a method `set_progress(progress)` are told.
        progress: Share of the run that is done, in [0, 1].
    """
    for module in criterion.modules():
        method = getattr(module, "set_progress", None)
        if method is not None:
            method(progress)
