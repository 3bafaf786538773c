"""k and m as functions of progress."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlo_core import RootedLoss, Schedule, create_loss, set_progress
from rlo_core.schedules import SHAPES
from torch import nn


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_warmup_goes_from_cross_entropy_to_the_loss_without_a_jump(shape: str) -> None:
    schedule = Schedule(0.5, shape)  # type: ignore[arg-type]
    path = [schedule.at(i / 1000, k=8.0, m=10.0) for i in range(501)]
    assert path[0] == (math.inf, None)
    assert path[-1] == (8.0, 10.0)
    rates = [1.0 / k for k, _ in path]
    scales = [1.0 if m is None else m / k for k, m in path]
    for values in (rates, scales):
        steps = [b - a for a, b in itertools.pairwise(values)]
        assert all(0.0 <= step < 1e-3 for step in steps)


def test_linear_is_linear_in_one_over_k() -> None:
    k, m = Schedule(1.0).at(0.25, k=8.0, m=None)
    assert 1.0 / k == pytest.approx(0.25 / 8.0)
    assert m is None


def test_geometric_multiplies_k_by_the_same_factor_each_step() -> None:
    schedule = Schedule(1.0, "geometric", 64.0)
    assert schedule.at(0.0, k=4.0, m=None)[0] == pytest.approx(64.0)
    assert schedule.at(0.5, k=4.0, m=None)[0] == pytest.approx(16.0)
    assert schedule.at(1.0, k=4.0, m=None)[0] == 4.0


def test_constant_stays_and_then_jumps() -> None:
    schedule = Schedule(0.1, "constant")
    assert schedule.at(0.0999, k=8.0, m=8.0) == (math.inf, None)
    assert schedule.at(0.1, k=8.0, m=8.0) == (8.0, 8.0)


@given(
    progress=st.floats(0.0, 1.0),
    warmup=st.floats(0.0, 1.0),
    k=st.floats(0.25, 1e6),
    m=st.none() | st.floats(0.1, 100.0),
    shape=st.sampled_from([s for s in SHAPES if s != "geometric"]),
)
def test_k_is_never_below_its_target_and_ends_there(
    progress: float, warmup: float, k: float, m: float | None, shape: str
) -> None:
    schedule = Schedule(warmup, shape)  # type: ignore[arg-type]
    now, multiplier = schedule.at(progress, k=k, m=m)
    assert now >= k * (1 - 1e-9)
    assert multiplier is None or multiplier > 0
    assert schedule.at(1.0, k=k, m=m) == (k, m)


def test_one_call_a_step_reaches_every_loss_inside_a_module() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), RootedLoss(8.0, warmup=0.5), RootedLoss(4.0)])
    set_progress(model, 0.25)
    assert model[1].k == pytest.approx(16.0)
    assert model[2].k == 4.0


def test_a_schedule_is_named_in_the_spec() -> None:
    criterion = create_loss("rlo:k=8,m=8,warmup=0.1")
    assert math.isinf(criterion.k)  # type: ignore[arg-type]
    set_progress(criterion, 0.1)
    assert (criterion.k, criterion.m) == (8.0, 8.0)
    set_progress(create_loss("ce"), 0.3)  # losses without a schedule need no question


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Schedule(1.5), "warmup must be in [0, 1], got 1.5"),
    (lambda: Schedule(math.nan), "warmup must be in [0, 1], got nan"),
    (
        lambda: Schedule(0.1, "step"),  # type: ignore[arg-type]
        "schedule must be one of constant, linear, cosine, geometric, got 'step'",
    ),
    (lambda: Schedule(0.1, k_start=0.0), "k_start must be positive, got 0.0"),
    (
        lambda: Schedule(0.1, "geometric"),
        "k_start must be finite for a geometric schedule, got inf",
    ),
    (lambda: Schedule(0.1).at(1.5, k=3.0, m=None), "progress must be in [0, 1], got 1.5"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_refused_schedule_says_why(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        call()
    assert str(caught.value) == words
