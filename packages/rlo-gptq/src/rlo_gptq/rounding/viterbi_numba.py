"""Viterbi's algorithm for one sequence as compiled loops, see `viterbi.py`; needs numba.

No fast-math and no fused operations: results are those of the torch form, to the bit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


def _compiled(function: Any) -> Any:
    """Compile a function when it is first called, and keep what comes of it where that can be."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder of this user's can be written
        return numba.njit(nogil=True)(function)


@_compiled
def best_codes(
    x: Any, weight: Any, values: Any, bits: int, seam: int, kept: Any, codes: Any
) -> None:  # pragma: no cover - compiled
    """Write the codes of one sequence.

    Args:
        x: (n,) float32.
        weight: (n,) float32.
        values: (2^L,) float32, of states r K + c at c R + r.
        bits: Of a code.
        seam: All codes but the oldest of the states at both ends; -1 for any.
        kept: (at least n R,) float32, overwritten: the costs that are kept.
        codes: (n,) int64, written.
    """
    n, K = len(x), 1 << bits
    R = len(values) // K
    Q = R // K
    infinite = np.float32(np.inf)
    cost = np.zeros(K * R, np.float32)
    low = np.empty(R, np.float32)
    if seam >= 0:
        cost[:] = infinite
        for oldest in range(K):
            state = oldest * R + seam
            cost[(state % K) * R + state // K] = np.float32(0)
    for t in range(n):
        for c in range(K):
            least = low[c * Q : (c + 1) * Q]
            for pair in range(0, K, 2):  # 2^b is even
                one = cost[c * R + pair * Q : c * R + (pair + 1) * Q]
                two = cost[c * R + (pair + 1) * Q : c * R + (pair + 2) * Q]
                if pair == 0:
                    for i in range(Q):
                        least[i] = one[i] if one[i] < two[i] else two[i]
                else:
                    for i in range(Q):
                        lower = one[i] if one[i] < two[i] else two[i]
                        least[i] = least[i] if least[i] < lower else lower
        entering = kept[t * R : (t + 1) * R]
        if K == 4:  # four streams that the compiler can interleave
            first, second = low[:Q], low[Q : 2 * Q]
            third, fourth = low[2 * Q : 3 * Q], low[3 * Q :]
            for i in range(Q):
                entering[4 * i] = first[i]
                entering[4 * i + 1] = second[i]
                entering[4 * i + 2] = third[i]
                entering[4 * i + 3] = fourth[i]
        else:
            for c in range(K):
                least = low[c * Q : (c + 1) * Q]
                for i in range(Q):
                    entering[K * i + c] = least[i]
        w = weight[t]
        slope = w * x[t] * np.float32(-2)
        for c in range(K):
            value, after = values[c * R : (c + 1) * R], cost[c * R : (c + 1) * R]
            for r in range(R):
                v = value[r]
                after[r] = (v * w + slope) * v + entering[r]
    best, state = infinite, 0
    if seam >= 0:
        for oldest in range(K):
            candidate = oldest * R + seam
            found = cost[(candidate % K) * R + candidate // K]
            if found < best:
                best, state = found, candidate
    else:
        for r in range(R):
            for c in range(K):
                if cost[c * R + r] < best:
                    best, state = cost[c * R + r], r * K + c
    for t in range(n - 1, -1, -1):
        codes[t] = state % K
        if t == 0:
            break
        w = weight[t - 1]
        slope = w * x[t - 1] * np.float32(-2)
        best, before = infinite, 0
        for oldest in range(K):
            candidate = oldest * R + state // K
            v = values[(candidate % K) * R + candidate // K]
            found = (v * w + slope) * v + kept[(t - 1) * R + candidate // K]
            if found < best:
                best, before = found, candidate
        state = before
