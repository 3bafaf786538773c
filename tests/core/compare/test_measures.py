"""The figures of held-out samples against torch, torchmetrics and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rlo_core.compare.measures import NOISE_RATES, Held, criterion_value
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error


def samples(
    n: int = 400, classes: int = 4, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(n, classes) * scale
    return logits, torch.randint(classes, (n,))


def held(logits: torch.Tensor, labels: torch.Tensor, *, parts: int = 1) -> dict:
    sums = Held()
    for z, y in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        sums.update(z, y)
    return sums.result()


def test_accuracy_cross_entropy_miss_and_calibration_are_those_of_other_libraries() -> None:
    logits, labels = samples()
    found = held(logits, labels)
    p = logits.softmax(-1)
    assert found["samples"] == 400
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["ce"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert found["miss"] == pytest.approx(1 - p[range(400), labels].mean().item(), rel=1e-5)
    expected = multiclass_calibration_error(p, labels, 4, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_split_into_batches_changes_nothing() -> None:
    logits, labels = samples(101)
    whole, parts = held(logits, labels), held(logits, labels, parts=7)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-9, err_msg=name)


def test_each_half_is_scaled_by_the_temperature_that_is_best_on_the_other() -> None:
    logits, _ = samples(2000)
    labels = torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]
    found = held(logits, labels)
    halves = [(logits[i::2].double(), labels[i::2]) for i in (0, 1)]

    def ce(t: float, half: int) -> float:
        z, y = halves[half]
        return F.cross_entropy(z / t, y).item()

    best = [minimize_scalar(lambda t, h=h: ce(t, h), bounds=(0.25, 32), method="bounded").x
            for h in (0, 1)]  # fmt: skip
    expected = (ce(best[1], 0) + ce(best[0], 1)) / 2
    # The grid of temperatures is 9 % fine, and cross entropy is flat at its best.
    assert found["ce_scaled"] == pytest.approx(expected, rel=2e-3)
    assert found["temperature"] == pytest.approx(math.sqrt(best[0] * best[1]), rel=0.06)
    assert found["temperature"] == pytest.approx(2.0, rel=0.15)
    assert found["ece_scaled"] < found["ece"] / 2
    p = torch.cat([(halves[h][0] / best[1 - h]).softmax(-1) for h in (0, 1)]).float()
    y = torch.cat([halves[0][1], halves[1][1]])
    near = multiclass_calibration_error(p, y, 4, n_bins=15, norm="l1").item()
    assert found["ece_scaled"] == pytest.approx(near, abs=0.02)


def test_forward_is_the_likelihood_of_a_label_through_evenly_wrong_ones() -> None:
    logits, labels = samples(50)
    found = held(logits, labels)["forward"]
    p = logits.double().softmax(-1).numpy()
    for rate, value in zip(NOISE_RATES, found, strict=True):
        through = np.full((4, 4), rate / 3) + np.eye(4) * (1 - rate - rate / 3)
        seen = (p @ through)[np.arange(50), labels.numpy()]
        assert value == pytest.approx(-np.log(seen).mean(), rel=1e-5)


def test_evenly_wrong_labels_keep_the_ranking_by_miss_but_not_by_likelihood() -> None:
    """Ghosh et al. 2017: the loss 1 - p summed over all labels is C - 1, whatever p."""
    truth = torch.randint(5, (20_000,))
    sure = F.one_hot(truth, 5).float() * 12.0
    hedged = F.one_hot(truth, 5).float() * 1.5
    noisy = torch.where(torch.rand(20_000) < 0.4, torch.randint(5, (20_000,)), truth)
    runs = [held(z, noisy) for z in (sure, hedged)]
    assert criterion_value(runs[0], "symmetric") < criterion_value(runs[1], "symmetric")
    assert criterion_value(runs[0], "likelihood") > criterion_value(runs[1], "likelihood")
    assert criterion_value(runs[0], "forward", 0.32) < criterion_value(runs[1], "forward", 0.32)


def test_the_confident_half_disagrees_with_wrong_labels_only() -> None:
    truth = torch.randint(3, (10_000,))
    logits = F.one_hot(truth, 3).float() * torch.linspace(0.1, 9.0, 10_000)[:, None]
    logits[:5000] = torch.randn(5000, 3) * 0.05  # the model does not know these
    noisy = torch.where(torch.rand(10_000) < 0.3, (truth + 1) % 3, truth)
    found = held(logits, noisy)
    assert found["sure_error"] == pytest.approx(0.3, abs=0.02)
    assert 1 - found["accuracy"] > 0.4


def test_a_run_that_diverged_is_worse_than_any() -> None:
    assert criterion_value({"diverged": True}, "symmetric") == math.inf
    assert criterion_value({"ce": math.nan, "miss": 0.1}, "likelihood") == math.inf
