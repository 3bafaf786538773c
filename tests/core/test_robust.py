"""The losses of others against their papers' formulas, written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rlo_core.errors import SpecError
from rlo_core.registry import create_loss, link_of
from rlo_core.robust import ELRLoss


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def agce(z: np.ndarray, y: int, a: float = 0.6, q: float = 0.6) -> float:
    return ((a + 1) ** q - (a + softmax(z)[y]) ** q) / q


def sce(z: np.ndarray, y: int, alpha: float = 0.1, beta: float = 1.0) -> float:
    p = softmax(z)
    reverse = -sum(p[c] * (0.0 if c == y else -4.0) for c in range(len(p)))
    return -alpha * math.log(p[y]) + beta * reverse


def nce(z: np.ndarray, y: int) -> float:
    p = softmax(z)
    return math.log(p[y]) / sum(math.log(x) for x in p)


def anl(z: np.ndarray, y: int, alpha: float = 5.0, beta: float = 5.0) -> float:
    p = softmax(z)
    flipped = [-math.log(1e-7) + math.log(max(x, 1e-7)) for x in p]
    return alpha * nce(z, y) + beta * (1 - flipped[y] / sum(flipped))


def jal(z: np.ndarray, y: int, alpha: float = 1.0, beta: float = 1.0, a: float = 30.0) -> float:
    p = softmax(z)
    corner = [a if c == y else 0.0 for c in range(len(p))]
    return alpha * nce(z, y) + beta * sum(
        (x - c) ** 2 for x, c in zip(p, corner, strict=True)
    ) / len(p)


def smoothed(z: np.ndarray, y: int, eps: float = 0.1) -> float:
    p = softmax(z)
    q = [eps / len(p) + (1 - eps) * (c == y) for c in range(len(p))]
    return -sum(share * math.log(x) for share, x in zip(q, p, strict=True))


def tempered(z: np.ndarray, y: int, t: float = 0.5) -> float:
    return -t * math.log(softmax(z / t)[y])


CASES = {
    "agce": (agce, {}),
    "agce:a=2,q=1.5": (agce, {"a": 2.0, "q": 1.5}),
    "sce": (sce, {}),
    "sce:alpha=6,beta=0.1": (sce, {"alpha": 6.0, "beta": 0.1}),
    "anl": (anl, {}),
    "anl:alpha=10,beta=1": (anl, {"alpha": 10.0, "beta": 1.0}),
    "jal": (jal, {}),
    "jal:alpha=5,beta=0.1,a=5": (jal, {"alpha": 5.0, "beta": 0.1, "a": 5.0}),
    "smooth-ce": (smoothed, {}),
    "smooth-ce:eps=0.3": (smoothed, {"eps": 0.3}),
    "tempered-ce": (tempered, {}),
    "tempered-ce:t=2": (tempered, {"t": 2.0}),
}


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_each_row_costs_what_the_paper_says(spec: str, scale: float) -> None:
    formula, options = CASES[spec]
    logits = torch.randn(6, 5, dtype=torch.float64) * scale
    target = torch.tensor([0, 1, 2, 3, 4, 2])
    expected = [formula(z.numpy(), int(y), **options) for z, y in zip(logits, target, strict=True)]
    found = create_loss(spec, reduction="none")(logits, target)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("spec", CASES)
def test_gradients_are_those_of_differences(spec: str) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    criterion = create_loss(spec)
    assert torch.autograd.gradcheck(lambda z: criterion(z, torch.tensor([0, 2, 1, 0])), logits)


@pytest.mark.parametrize("spec", CASES)
def test_float32_gradients_are_finite_far_from_a_fit(spec: str) -> None:
    logits = torch.tensor([[0.0, 200.0], [200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    create_loss(spec)(logits, torch.tensor([0, 0, 1])).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("spec", ["anl", "jal", "tempered-ce:t=2", "smooth-ce"])
def test_class_weights_ignored_targets_and_pixels_count_as_under_cross_entropy(spec: str) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5])
    logits, target = torch.randn(2, 3, 4), torch.tensor([[0, -100, 2, 1], [1, 1, -100, 0]])
    # The weights of a smoothed label are those of all classes, so it is checked without them.
    given = {} if spec == "smooth-ce" else {"weight": weight}
    each = create_loss(spec, reduction="none")(logits, target)
    assert each.shape == (2, 4)
    kept = target != -100
    w = weight[target.where(kept, 0)] * kept if given else kept.float()
    found = create_loss(spec, **given)(logits, target)
    torch.testing.assert_close(found, (each * w).sum() / w.sum())


@pytest.mark.parametrize("spec", ["anl", "jal", "tempered-ce"])
def test_a_mixed_label_costs_its_expectation(spec: str) -> None:
    logits, criterion = torch.randn(1, 3), create_loss(spec)
    hard = torch.stack([criterion(logits, torch.tensor([c])) for c in range(3)])
    q = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(criterion(logits, q), (hard * q[0]).sum())


def test_agce_without_an_offset_is_gce_and_sce_is_poly1() -> None:
    logits, target = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    near = create_loss("agce:a=1e-12,q=0.7")(logits, target)
    torch.testing.assert_close(near, create_loss("gce:q=0.7")(logits, target))
    found = create_loss("sce:alpha=1,beta=0.5")(logits, target)
    torch.testing.assert_close(found, create_loss("poly1:eps=2")(logits, target))
    assert link_of(create_loss("sce")) is not None


@pytest.mark.parametrize("spec", ["anl", "jal", "smooth-ce", "tempered-ce"])
def test_what_looks_at_the_whole_row_is_no_link(spec: str) -> None:
    assert link_of(create_loss(spec)) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("agce:a=0", "loss 'agce:a=0': a must be positive, got 0.0"),
        ("sce:alpha=-1", "loss 'sce:alpha=-1': alpha must be at least 0, got -1.0"),
        ("sce:alpha=0,beta=0", "loss 'sce:alpha=0,beta=0': alpha and beta must not both be 0"),
        ("smooth-ce:eps=2", "loss 'smooth-ce:eps=2': eps must be in [0, 1], got 2.0"),
        ("tempered-ce:t=0", "loss 'tempered-ce:t=0': t must be positive, got 0.0"),
    ],
)
def test_an_option_out_of_its_range_is_named(spec: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        create_loss(spec)
    assert str(caught.value) == message


def test_elr_keeps_a_running_mean_for_each_sample_and_follows_its_formula() -> None:
    criterion = ELRLoss(3, 2, lam=2.0, beta=0.5).double()
    z1 = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    criterion(z1, torch.tensor([0, 1]), torch.tensor([2, 0]))
    found = criterion(z2, torch.tensor([1]), torch.tensor([2]))
    first, now = softmax(z1[0].numpy()), softmax(z2[0].detach().numpy())
    mean = 0.5 * (0.5 * first) + 0.5 * now
    expected = -math.log(now[1]) + 2.0 * math.log(1 - float(now @ mean))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    found.backward()
    # The running mean is a constant to the gradient.
    inner = now * mean - now * float(now @ mean)
    gradient = now - np.array([0.0, 1.0]) - 2.0 * inner / (1 - float(now @ mean))
    np.testing.assert_allclose(z2.grad[0].numpy(), gradient, rtol=1e-9)
    assert criterion.targets[1].tolist() == [0.0, 0.0]
