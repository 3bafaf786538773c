"""Error budgets: against float64 truth we are no worse than torch in the same precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rlo_core import CE, DFT, Link, Rooted, RootedConvex, link_linear_cross_entropy
from rlo_core._cross_entropy import apply_link
from rlo_core.linear.ops import LossRows, LossSum
from rlo_core.linear.settings import Settings
from torch import Tensor

LINKS = [CE(), Rooted(5.0), RootedConvex(5.0), DFT()]


def problem(
    tokens: int, width: int, classes: int, dtype: torch.dtype, spread: float = 1.0
) -> list[Tensor]:
    hidden = (torch.randn(tokens, width) * spread).to(dtype)
    weight = (torch.randn(classes, width) * 0.5).to(dtype)
    bias = torch.randn(classes).to(dtype)
    return [hidden, weight, bias, torch.randint(classes, (tokens,))]


def outcome(
    tensors: list[Tensor], link: Link, impl: str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Loss and gradients in float64 numbers."""
    *leaves, target = tensors
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in leaves]
    hidden, weight, bias = leaves
    loss = link_linear_cross_entropy(hidden, weight, target, link, bias=bias, impl=impl)
    return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 2e-4)],
    ids=str,
)
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_error_is_at_most_that_of_torch_in_the_same_precision(link, dtype, tolerance, impl):
    """Loss and the gradients of hidden, weight and bias, over more than one chunk.

    The tolerance is 8 units of the last place in float32, where torch's vectorised softmax is that
    much off, and half a unit in bfloat16, from the rounding of a bias gradient per chunk.
    """
    tensors = problem(600, 32, 257, dtype)
    truth = outcome(tensors, link, "torch", torch.float64)
    ours, theirs = outcome(tensors, link, impl), outcome(tensors, link, "torch")
    for name, a, b, exact in zip(
        ("loss", "hidden", "weight", "bias"), ours, theirs, truth, strict=True
    ):
        assert error(a, exact) <= error(b, exact) + tolerance, name


def test_float32_loss_of_a_sure_prediction_keeps_its_digits():
    """ce = 1e-5 beside a largest logit of 1000: lse - z_y has no such digit left."""
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[1000.0, 0.0], [1000.0 - 11.5, 0.0]])
    loss = link_linear_cross_entropy(hidden, weight, torch.tensor([0]), CE(), impl="chunked")
    expected = F.softplus(torch.tensor(-11.5, dtype=torch.float64))
    assert abs(loss.item() / expected.item() - 1) < 1e-2
    naive = torch.logsumexp(hidden @ weight.t(), -1) - (hidden @ weight.t())[:, 0]
    assert abs(naive.item() / expected.item() - 1) > 0.5


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("columns", [0, 40])
def test_float16_gradients_over_1e5_tokens_are_not_flushed_to_zero(link, columns):
    """With 1/N or the slope inside the float16 tile most entries would be below 6e-8."""
    hidden, weight, _, target = problem(100_000, 8, 64, torch.float16)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    # float16 as on CUDA; a CPU computes it in float32
    settings = Settings(torch.float16, 64, rows=8192, columns=columns).with_grads(h, w, None)
    if columns:
        ce = LossRows.apply(h, w, None, target, *settings.arguments())[0]
        loss = apply_link(ce, link).sum() / len(target)
    else:
        settings = settings.with_link(link)
        loss = LossSum.apply(h, w, None, target, None, *settings.arguments())[0] / len(target)
    scale = 2.0**14  # what a gradient scaler has; without one the result itself is below float16
    found = torch.autograd.grad(loss * scale, (h, w))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(
        link_linear_cross_entropy(*exact, target, link, impl="torch") * scale, exact
    )
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float16
        assert error(a.double(), b) < 5e-3


def test_a_convex_slope_beyond_float16_does_not_overflow():
    """e^(ce/k) = e^30 is 1e13; it stays in float32 beside the tile."""
    hidden = torch.full((4, 4), 8.0, dtype=torch.bfloat16)
    weight = torch.zeros(5, 4, dtype=torch.bfloat16)
    weight[0] = 1.0
    target = torch.tensor([0, 0, 1, 2])
    for dtype in (torch.bfloat16, torch.float32):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = link_linear_cross_entropy(h, w, target, RootedConvex(1.0), impl="chunked")
        found = torch.autograd.grad(loss, (h, w))
        assert all(torch.isfinite(x).all() for x in (loss, *found))
        assert found[1].abs().max() > 1e12


@pytest.mark.parametrize("k", [1.0, 8.0])
def test_llama_3_vocabulary_with_k_1_matches_float64(k):
    hidden, weight, bias, target = problem(5, 8, 128_256, torch.float32)
    ours = outcome([hidden, weight, bias, target], Rooted(k), "chunked")
    truth = outcome([hidden, weight, bias, target], Rooted(k), "torch", torch.float64)
    for a, b in zip(ours, truth, strict=True):
        assert error(a, b) < 2e-5


@pytest.mark.parametrize("size", [1e3, 1e10, 1e18])
def test_huge_logits_stay_finite(size):
    hidden = torch.eye(3).requires_grad_()
    weight = (torch.eye(4, 3) * size).requires_grad_()
    target = torch.tensor([0, 1, 3])
    for link in (CE(), Rooted(1.0), RootedConvex(3.0)):
        loss = link_linear_cross_entropy(hidden, weight, target, link, impl="chunked")
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all(torch.isfinite(x).all() for x in (loss, *grads)), link
