r"""The multiple-choice knapsack, solved exactly: a choice of each group, least loss within a size.

With :math:`\lambda` the loss that one more byte saves at the margin, every choice has a penalty

.. math:: p_{gi} = l_{gi} + \lambda b_{gi} - \min_j (l_{gj} + \lambda b_{gj}) \ge 0,

and the loss of any selection within B bytes is the Lagrangian bound, plus its penalties, plus
:math:`\lambda` times the bytes it leaves. So only selections whose penalties sum to at most the gap
between a feasible selection and the bound can be better; these are few, and are all looked at, by
dynamic programming over (bytes, loss) pairs of which no one is dominated. The gap is approached
from below: a selection found within a part of it is the best there is.

Source: Dyer, Kayal and Walker, "A branch and bound algorithm for solving the multiple-choice
knapsack problem" (1984); Pisinger, "A minimal algorithm for the multiple-choice knapsack problem"
(1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rlo_core.errors import RLOError

Group = Sequence[tuple[int, float]]
"""Bytes and loss of each choice."""

_PARTS = (1 / 64, 1 / 16, 1 / 4, 1.0)


class InfeasibleError(RLOError):
    """A size that not even the smallest choices fit."""

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(f"budget must be at least {smallest} bytes, got {budget}")
        self.smallest = smallest


@dataclass(frozen=True)
class _Kept:
    """The choices of one group that are neither larger nor worse than others, by rising bytes."""

    index: np.ndarray
    bytes: np.ndarray
    loss: np.ndarray


def solve(groups: Sequence[Group], budget: int) -> list[int]:
    """Return the number of the choice for each group: the least sum of losses within the budget.

    Args:
        groups: One or more choices each; bytes at least 0, losses finite.
        budget: Bytes, inclusive.

    Raises:
        InfeasibleError: the smallest choices are larger together; names their size.

    Example:
        >>> solve([[(1, 5.0), (2, 1.0)], [(1, 3.0), (2, 2.0)]], 3)
        [1, 0]
    """
    kept = [_undominated(group) for group in groups]
    smallest = sum(int(k.bytes[0]) for k in kept)
    if smallest > budget:
        raise InfeasibleError(budget, smallest)
    price, feasible = _relaxed(kept, budget)
    reduced = [k.loss + price * k.bytes for k in kept]
    bound = sum(float(r.min()) for r in reduced) - price * budget
    gap = max(0.0, sum(float(k.loss[i]) for k, i in zip(kept, feasible, strict=True)) - bound)
    penalties = [r - r.min() for r in reduced]
    scale = sum(float(abs(r).max()) for r in reduced)
    slack = 1e-12 * scale  # of sums of floats
    found = feasible
    for part in _PARTS:
        better = _within(kept, penalties, price, budget, part * gap + slack)
        if better is not None:
            found = better
            break
    return [int(k.index[i]) for k, i in zip(kept, found, strict=True)]


def _undominated(group: Group) -> _Kept:
    order = sorted(range(len(group)), key=lambda i: (group[i][0], group[i][1]))
    chosen: list[int] = []
    for i in order:
        if not chosen or group[i][1] < group[chosen[-1]][1]:
            chosen.append(i)
    sizes = np.array([group[i][0] for i in chosen], dtype=np.int64)
    return _Kept(np.array(chosen), sizes, np.array([group[i][1] for i in chosen], dtype=float))


def _hull(k: _Kept) -> list[int]:
    """Return the choices on the lower convex hull of (bytes, loss)."""
    hull: list[int] = []
    for i in range(len(k.bytes)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            left = (k.loss[a] - k.loss[b]) * float(k.bytes[i] - k.bytes[b])
            if left > (k.loss[b] - k.loss[i]) * float(k.bytes[b] - k.bytes[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _relaxed(kept: Sequence[_Kept], budget: int) -> tuple[float, list[int]]:
    """Return the price of a byte at the margin, and a feasible selection by greedy steps."""
    steps = []
    for g, k in enumerate(kept):
        hull = _hull(k)
        for a, b in pairwise(hull):
            size = int(k.bytes[b] - k.bytes[a])
            steps.append((float(k.loss[a] - k.loss[b]) / size, g, a, b, size))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    chosen = [0] * len(kept)
    left = budget - sum(int(k.bytes[0]) for k in kept)
    price = 0.0
    for gain, g, a, b, size in steps:
        if chosen[g] == a and size <= left:
            chosen[g], left = b, left - size
        elif price == 0.0:
            price = gain
    return price, chosen


def _within(
    kept: Sequence[_Kept],
    penalties: Sequence[np.ndarray],
    price: float,
    budget: int,
    allowed: float,
) -> list[int] | None:
    """Return the best selection whose penalties sum to at most `allowed`; None without any."""
    few = [np.flatnonzero(p <= allowed) for p in penalties]
    after = np.cumsum([int(k.bytes[f].min()) for k, f in zip(kept, few, strict=True)][::-1])[::-1]
    least = [*after[1:].tolist(), 0]  # bytes of what comes after a group, at its smallest
    sizes, sums = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for k, p, f, rest in zip(kept, penalties, few, least, strict=True):
        size = (sizes[:, None] + k.bytes[f][None]).ravel()
        total = (sums[:, None] + p[f][None]).ravel()
        good = np.flatnonzero((total <= allowed) & (size + rest <= budget))
        # A state with fewer bytes and less loss (penalty less what its bytes cost) is as good.
        loss = total[good] - price * size[good]
        order = good[np.lexsort((loss, size[good]))]
        loss = total[order] - price * size[order]
        lowest = np.minimum.accumulate(loss)
        keep = np.ones(len(order), dtype=bool)
        keep[1:] = loss[1:] < lowest[:-1]
        order = order[keep]
        if not len(order):
            return None
        trail.append((order // len(f), f[order % len(f)]))
        sizes, sums = size[order], total[order]
    excess = sums + price * (budget - sizes)
    best = int(excess.argmin())
    if excess[best] > allowed:
        return None  # what is better may have been left out
    chosen = []
    for before, choice in reversed(trail):
        chosen.append(int(choice[best]))
        best = int(before[best])
    return chosen[::-1]
