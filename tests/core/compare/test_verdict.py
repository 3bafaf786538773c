"""Intervals and verdicts against SciPy, against simulation and against runs written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from rlo_core.compare.search import SearchOptions
from rlo_core.compare.task import CompareError, Task
from rlo_core.compare.verdict import UNSEEN, interval, verdict_of, wilson
from scipy import stats


class Two(Task):
    host = "two"
    rates = (1.0,)
    default = 0

    def describe(self) -> dict[str, Any]:
        return {}

    def check(self, loss: str) -> None: ...

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        raise NotImplementedError

    def apply(self, loss: str, rate: float, out: Any) -> dict[str, Any]:
        raise NotImplementedError


def record(accuracy: float, miss: float, ce: float = 0.5, ece: float = 0.1) -> dict[str, Any]:
    return {
        "samples": 1000, "accuracy": accuracy, "ce": ce, "miss": miss, "forward": [ce] * 12,
        "ece": ece, "ece_scaled": 0.03, "sure_error": 0.2, "sure_samples": 500, "seconds": 1.0,
    }  # fmt: skip


def runs_of_two(gaps: dict[str, float], noise: float = 0.001) -> dict[Any, Any]:
    runs: dict[Any, Any] = {("ce", 0): {}, ("rlo:k=2", 0): {}}
    for seed in range(4):
        jitter = noise * (-1) ** seed * (1 + seed)
        runs[("ce", 0)][seed] = record(0.7 + 0.01 * seed, 0.4)
        runs[("rlo:k=2", 0)][seed] = record(
            0.7 + 0.01 * seed + gaps["accuracy"] + jitter, 0.4 + gaps["miss"] + jitter,
            0.5 + gaps["ce"] + jitter,
        )  # fmt: skip
    return runs


OPTIONS = SearchOptions(losses=("ce", "rlo:k=2"), seeds=4)


def test_the_interval_is_scipys_for_paired_samples() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    expected = stats.ttest_rel(b, a).confidence_interval(0.9)
    assert interval(list(b - a), level=0.9) == pytest.approx((expected.low, expected.high))


def test_overlapping_splits_widen_it_by_nadeau_and_bengios_factor() -> None:
    gaps = [0.1, 0.3, 0.2, 0.25]
    low, high = interval(gaps)
    wide = interval(gaps, overlap=0.25)
    assert (wide[1] - wide[0]) / (high - low) == pytest.approx(math.sqrt((0.25 + 0.25) / 0.25))


def test_the_interval_of_a_share_is_scipys_wilson() -> None:
    expected = stats.binomtest(37, 200).proportion_ci(0.95, method="wilson")
    assert wilson(37 / 200, 200) == pytest.approx((expected.low, expected.high))


def test_each_metric_has_a_verdict_of_its_own() -> None:
    runs = runs_of_two({"accuracy": 0.05, "miss": -0.05, "ce": 0.2})
    verdict = verdict_of(runs, Two(), OPTIONS)
    assert verdict["choice"] == "rlo:k=2"
    assert verdict["summary"] == "use rlo:k=2 at lr 1"
    accuracy, ce, ece, scaled = verdict["sentences"]
    assert accuracy.startswith("accuracy: rlo:k=2 is better than ce by +")
    assert ce.startswith("cross entropy: ce is better than all that were compared; rlo:k=2 +0.19")
    assert ece.startswith(f"calibration error: {UNSEEN}")
    assert scaled.startswith("calibration error after temperature scaling: ")


def test_a_loss_that_leads_by_the_criterion_but_loses_accuracy_is_not_chosen() -> None:
    runs = runs_of_two({"accuracy": -0.05, "miss": -0.05, "ce": 0.2})
    verdict = verdict_of(runs, Two(), OPTIONS)
    assert (verdict["best"], verdict["choice"]) == ("rlo:k=2", "ce")
    assert verdict["summary"] == (
        "use ce at lr 1: rlo:k=2 leads by the criterion but loses accuracy"
    )


def test_metrics_are_of_trusted_labels_where_there_are_any_and_the_criterion_is_not() -> None:
    runs = runs_of_two({"accuracy": -0.05, "miss": -0.05, "ce": 0.0})
    for seed in range(4):
        runs[("ce", 0)][seed]["trusted"] = record(0.8, 0.3)
        runs[("rlo:k=2", 0)][seed]["trusted"] = record(0.9 + 0.001 * seed, 0.35)
    verdict = verdict_of(runs, Two(), OPTIONS)
    assert verdict["choice"] == "rlo:k=2"
    assert verdict["trusted"]
    assert "accuracy: rlo:k=2 is better than ce by +10.1" in verdict["sentences"][0]


def test_noise_is_between_the_confident_halfs_disagreement_and_everybodys() -> None:
    verdict = verdict_of(runs_of_two({"accuracy": 0, "miss": 0, "ce": 0}), Two(), OPTIONS)
    assert verdict["noise"]["rate"] == 0.2
    assert verdict["noise"]["low"] == pytest.approx(wilson(0.2, 500)[0], abs=1e-4)
    assert verdict["noise"]["high"] == pytest.approx(wilson(0.285, 1000)[1], abs=2e-3)


def test_one_seed_is_no_verdict() -> None:
    runs = {config: {0: seeds[0]} for config, seeds in
            runs_of_two({"accuracy": 0, "miss": 0, "ce": 0}).items()}  # fmt: skip
    with pytest.raises(CompareError) as caught:
        verdict_of(runs, Two(), OPTIONS)
    assert str(caught.value) == "no loss has two seeds together with ce; give more --trials"
