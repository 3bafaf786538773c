"""The knapsack against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlo_gptq.allocation.knapsack import InfeasibleError, solve

LOSS = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))
GROUP = st.lists(st.tuples(st.integers(0, 12), LOSS), min_size=1, max_size=4)


def brute_force(groups, budget):
    best = None
    for chosen in itertools.product(*(range(len(group)) for group in groups)):
        size = sum(group[i][0] for group, i in zip(groups, chosen, strict=True))
        loss = sum(group[i][1] for group, i in zip(groups, chosen, strict=True))
        if size <= budget and (best is None or loss < best):
            best = loss
    return best


@given(st.lists(GROUP, min_size=1, max_size=5), st.integers(0, 60))
@settings(max_examples=400, deadline=None)
def test_no_selection_within_the_budget_has_less_loss(groups, budget):
    expected = brute_force(groups, budget)
    if expected is None:
        with pytest.raises(InfeasibleError) as caught:
            solve(groups, budget)
        smallest = sum(min(size for size, _ in group) for group in groups)
        assert caught.value.smallest == smallest
        return
    chosen = solve(groups, budget)
    size = sum(group[i][0] for group, i in zip(groups, chosen, strict=True))
    loss = sum(group[i][1] for group, i in zip(groups, chosen, strict=True))
    assert size <= budget
    assert loss == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_two_hundred_layers_is_solved_as_dynamic_programming_over_bytes_does(seed):
    """Sizes and losses as layers have them: a few shapes, loss falling by 4 a bit."""
    generator = np.random.default_rng(seed)
    groups = []
    for layer in range(210):
        size = (9, 3, 3, 9, 24, 24, 24)[layer % 7]
        weight = float(np.exp(generator.normal(0, 1.5)))
        bits = (2, 3, 4, 5, 6, 8)
        noise = np.exp(generator.normal(0, 0.1, len(bits)))
        groups.append([(b * size, weight * 4.0**-b * n) for b, n in zip(bits, noise, strict=True)])
    budget = int(2.7 * sum(group[0][0] // 2 for group in groups))
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for group in groups:
        new = np.full(budget + 1, np.inf)
        for size, loss in group:
            new[size:] = np.minimum(new[size:], best[: budget + 1 - size] + loss)
        best = new
    chosen = solve(groups, budget)
    assert sum(g[i][0] for g, i in zip(groups, chosen, strict=True)) <= budget
    loss = sum(g[i][1] for g, i in zip(groups, chosen, strict=True))
    assert loss == pytest.approx(best.min(), rel=1e-12)
