"""Smoothed and soft targets in one pass are the definition, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rlo_core import functional
from rlo_core.functional import link_cross_entropy
from rlo_core.links import GCE, Link, Rooted
from torch import Tensor

LINKS = [Rooted(3.0, 4.0), Rooted(8.0), GCE(0.7)]


def definition(logits: Tensor, q: Tensor, link: Link) -> Tensor:
    """The expected loss of each row, in float64."""
    ce = -logits.double().log_softmax(-1)
    return (q.double() * link.value(ce)).sum(-1)


def target_of(kind: str, rows: int, classes: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A target, the distribution that it stands for, and the options with it."""
    index = torch.randint(classes, (rows,))
    hot = torch.nn.functional.one_hot(index, classes).double()
    soft = torch.rand(rows, classes, dtype=torch.float64).mul(4).softmax(-1)
    if kind == "smoothed":
        return index, hot * 0.9 + 0.1 / classes, {"label_smoothing": 0.1}
    if kind == "soft":
        return soft, soft, {}
    if kind == "one-hot":
        return hot, hot, {}
    return soft, soft * 0.8 + 0.2 / classes, {"label_smoothing": 0.2}


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("kind", ["smoothed", "soft", "one-hot", "soft and smoothed"])
@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_value_and_gradient_are_those_of_the_definition(
    link: Link, kind: str, classes: int, spread: float
) -> None:
    logits = torch.randn(6, classes) * spread
    target, q, options = target_of(kind, 6, classes)
    wide = logits.double().requires_grad_()
    wanted = definition(wide, q, link)
    wanted.mean().backward()
    ours = logits.clone().requires_grad_()
    loss = link_cross_entropy(ours, target, link, reduction="none", **options)
    loss.mean().backward()
    assert "SoftRowLoss" in type(loss.grad_fn).__name__
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=1e-6)
    assert wide.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["smoothed", "soft"])
def test_gradients_of_gradients_are_right(kind: str, reduction: str) -> None:
    logits = (torch.randn(3, 4, dtype=torch.float64) * 3).requires_grad_()
    target, _, options = target_of(kind, 3, 4)

    def loss(z: Tensor) -> Tensor:
        return link_cross_entropy(z, target, Rooted(3.0, 4.0), reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_an_ignored_label_takes_the_composed_form() -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, -100, 3, 1])
    loss = link_cross_entropy(logits, target, Rooted(3.0), label_smoothing=0.1)
    kept = target != -100
    rest = link_cross_entropy(logits[kept], target[kept], Rooted(3.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, rest)


def test_a_gap_of_thousands_keeps_its_gradient() -> None:
    logits = torch.tensor([[0.0, 5000.0], [300.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 1])
    functional.rooted_loss(logits, target, k=64.0, label_smoothing=0.1).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1, 0] > 0
