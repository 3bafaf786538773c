"""The losses on logits: formulas, limits, gradients, soft targets, every way to call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import rlo_core
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rlo_core import (
    binary_rooted_convex_loss,
    binary_rooted_loss,
    dft_loss,
    focal_loss,
    gce_loss,
    link_binary_cross_entropy,
    link_cross_entropy,
    poly1_loss,
    rooted_convex_loss,
    rooted_loss,
)
from rlo_core import functional as functional_module
from rlo_core.links import CE, DFT, GCE, Focal, Link, Poly1, Rooted, RootedConvex
from torch import Tensor

NAMED: list[tuple[Callable[..., Tensor], dict[str, float], Link]] = [
    (rooted_loss, {"k": 5.0, "m": 4.0}, Rooted(5.0, 4.0)),
    (rooted_convex_loss, {"k": 2.0}, RootedConvex(2.0)),
    (focal_loss, {"gamma": 2.0, "alpha": 0.5}, Focal(2.0, 0.5)),
    (gce_loss, {"q": 0.6}, GCE(0.6)),
    (dft_loss, {}, DFT()),
    (poly1_loss, {"eps": 2.0}, Poly1(2.0)),
]
LINKS = [link for _, _, link in NAMED]
composed = functional_module._hard


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    logits = torch.randn(12, 5, dtype=torch.float64) * 3.0
    target = torch.randint(0, 5, (12,))
    target[4] = -100
    return logits.requires_grad_(), target


@pytest.mark.parametrize(("function", "options", "link"), NAMED, ids=[str(link) for link in LINKS])
def test_a_named_function_is_its_link_on_cross_entropy(
    function: Callable[..., Tensor], options: dict[str, float], link: Link
) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -1, 0])
    others: dict[str, Any] = {
        "weight": torch.rand(4),
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "reduction": "none",
    }
    found = function(logits, target, **options, **others)
    torch.testing.assert_close(found, link_cross_entropy(logits, target, link, **others))


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 60.0, 100.0])
@pytest.mark.parametrize("k", [1.0, 3.0, 64.0])
def test_the_released_softmax_then_power_is_reproduced_where_it_is_finite(
    k: float, gap: float
) -> None:
    """The released code's formula in float64, on logits that miss by `gap`."""
    logits = torch.tensor([[gap, 0.0, -1.0]], requires_grad=True)
    target = torch.tensor([1])
    exact = logits.detach().double().requires_grad_()
    reference = (k * (1.0 - F.softmax(exact, 1)[0, 1] ** (1.0 / k))).mean()
    (expected,) = torch.autograd.grad(reference, exact)
    loss = rooted_loss(logits, target, k=k, m=k)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=3e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [104.0, 1e3, 6e4])
@pytest.mark.parametrize("k", [1.0, 2.0, 5.0])
def test_gaps_that_broke_the_released_code_give_finite_losses_and_gradients(
    dtype: torch.dtype, gap: float, k: float
) -> None:
    logits = torch.tensor([[gap, 0.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([1])
    broken = (1.0 - F.softmax(logits.double().float(), 1)[:, 1] ** (1.0 / k)).mean()
    (gradient,) = torch.autograd.grad(broken, logits)
    assert k == 1.0 or torch.isnan(gradient).any()
    for function in (rooted_loss, rooted_convex_loss):
        loss = function(logits, target, k=k)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        if function is rooted_loss or dtype != torch.float16:
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_the_plain_case_and_the_composed_one_agree(
    link: Link, reduction: Any, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch
    one = link_cross_entropy(logits, target, link, reduction=reduction)
    other = composed(logits, target, link, None, -100, 0.0, reduction)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 47, 48, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_plain_case_is_as_accurate_as_float64_allows_in_every_dtype(
    classes: int, dtype: torch.dtype, scale: float
) -> None:
    logits = (torch.randn(700, classes) * scale).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (700,))
    exact = logits.detach().double().requires_grad_()
    reference = composed(exact, target, Rooted(5.0), None, -100, 0.0, "none")
    (expected,) = torch.autograd.grad(reference.sum(), exact)
    loss = link_cross_entropy(logits, target, Rooted(5.0), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=2e-6)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        gradient.double(), expected, rtol=unit + 1e-5, atol=1e-6 if dtype != torch.float16 else 1e-4
    )


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_soft_target_is_the_expectation_over_hard_ones(
    link: Link, smoothing: float, weighted: bool
) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    q = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    found = link_cross_entropy(
        logits, q, link, weight=weight, label_smoothing=smoothing, reduction="none"
    )
    smoothed = q * (1.0 - smoothing) + smoothing / 4
    expected = sum(
        smoothed[:, c]
        * link.value(F.cross_entropy(logits, torch.full((6,), c), reduction="none"))
        * (1.0 if weight is None else weight[c])
        for c in range(4)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_one_hot_target_is_the_index(link: Link, smoothing: float) -> None:
    logits, target = torch.randn(6, 4, 3, dtype=torch.float64), torch.randint(0, 4, (6, 3))
    one_hot = F.one_hot(target, 4).movedim(-1, 1).double()
    by_index, by_probability = (
        link_cross_entropy(logits, t, link, label_smoothing=smoothing, reduction="none")
        for t in (target, one_hot)
    )
    torch.testing.assert_close(by_index, by_probability, rtol=1e-12, atol=1e-13)


def test_class_weights_multiply_the_value_and_the_mean_divides_by_their_sum() -> None:
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, -100])
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    each = rooted_loss(logits[:4], target[:4], reduction="none") * weight[target[:4]]
    found = rooted_loss(logits, target, weight=weight)
    torch.testing.assert_close(found, each.sum() / weight[target[:4]].sum())


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_a_smoothed_label_weighs_each_class_by_its_own_weight(link: Link) -> None:
    """torch's rule, of a cross entropy with class weights and smoothing, class by class."""
    logits = torch.randn(4, 3, dtype=torch.float64)
    target, weight = [0, 1, 2, 1], [0.2, 1.0, 3.0]
    each = []
    for row, label in zip(logits, target, strict=True):
        values = [float(link.value(-row.log_softmax(-1)[c])) for c in range(3)]
        spread = sum(w * value for w, value in zip(weight, values, strict=True)) / 3
        each.append(0.9 * weight[label] * values[label] + 0.1 * spread)
    found = link_cross_entropy(
        logits,
        torch.tensor(target),
        link,
        weight=torch.tensor(weight, dtype=torch.float64),
        label_smoothing=0.1,
        reduction="none",
    )
    torch.testing.assert_close(found, torch.tensor(each, dtype=torch.float64))


def test_the_convex_loss_is_convex_in_the_logits_and_the_bounded_one_is_not() -> None:
    """Midpoints of random pairs, float64."""
    a, b = (torch.randn(4000, 5, dtype=torch.float64) * 4.0 for _ in range(2))
    target = torch.randint(0, 5, (4000,))
    for k in (0.5, 1.0, 3.0, 50.0):
        losses = [rooted_convex_loss(z, target, k=k, reduction="none") for z in (a, b, (a + b) / 2)]
        slack = (losses[0] + losses[1]) / 2 - losses[2]
        assert bool((slack >= -1e-9 * losses[2].clamp(min=1.0)).all())
    losses = [rooted_loss(z, target, k=3.0, reduction="none") for z in (a, b, (a + b) / 2)]
    assert bool(((losses[0] + losses[1]) / 2 < losses[2] - 1e-3).any())


def test_the_bounded_loss_stays_below_m() -> None:
    logits = torch.randn(1000, 7) * 100
    loss = rooted_loss(logits, torch.randint(0, 7, (1000,)), k=3.0, m=2.0, reduction="none")
    assert bool((loss >= 0).all())
    assert bool((loss <= 2.0).all())


@pytest.mark.parametrize("k", [1.0, 2.0, 5.0])
def test_the_gan_form_is_the_papers_up_to_the_constant(k: float) -> None:
    """k (1 + e^-x)^(1/k), as the authors' StyleGAN loss has it, less k."""
    x = torch.linspace(-30.0, 30.0, 101, dtype=torch.float64)
    found = binary_rooted_convex_loss(x, torch.ones_like(x), k=k, reduction="none")
    torch.testing.assert_close(found, k * (1.0 + torch.exp(-x)) ** (1.0 / k) - k)
    fake = binary_rooted_convex_loss(x, torch.zeros_like(x), k=k, reduction="none")
    torch.testing.assert_close(fake, k * (1.0 + torch.exp(x)) ** (1.0 / k) - k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gan_form_is_finite_where_the_released_one_overflows(dtype: torch.dtype) -> None:
    x = torch.tensor([-88.8, -1e3, -6e4], dtype=dtype, requires_grad=True)
    assert torch.isinf(2.0 * (1.0 + torch.exp(-x.float())) ** 0.5).any()
    loss = binary_rooted_convex_loss(x.float(), torch.ones(3), k=2.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all() or dtype == torch.float16


def test_two_class_logits_and_one_binary_logit_agree() -> None:
    x = torch.randn(20, dtype=torch.float64) * 5
    target = torch.randint(0, 2, (20,))
    two = torch.stack([torch.zeros_like(x), x], 1)
    for link in LINKS:
        torch.testing.assert_close(
            link_binary_cross_entropy(x, target.double(), link, reduction="none"),
            link_cross_entropy(two, target, link, reduction="none"),
        )


def test_pos_weight_multiplies_the_positive_term_only() -> None:
    x, target = torch.randn(5, 3), torch.rand(5, 3)
    weight = torch.tensor([1.0, 2.0, 3.0])
    plain = binary_rooted_loss(x, torch.ones(5, 3), reduction="none") * target * weight
    plain = plain + binary_rooted_loss(x, torch.zeros(5, 3), reduction="none") * (1 - target)
    found = binary_rooted_loss(x, target, pos_weight=weight, reduction="none")
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("link", [*LINKS[:4], LINKS[5]], ids=str)
def test_first_and_second_derivatives_match_finite_differences(
    link: Link, reduction: Any, batch: tuple[Tensor, Tensor]
) -> None:
    logits, target = batch[0][:6], batch[1][:6]
    logits = logits.detach().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return link_cross_entropy(z, target, link, reduction=reduction)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize(
    ("smoothing", "weighted", "soft"),
    [(0.1, False, False), (0.0, True, False), (0.1, True, True), (0.0, False, True)],
)
def test_second_derivatives_hold_for_smoothing_weights_and_soft_targets(
    smoothing: float, weighted: bool, soft: bool
) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 3, dtype=torch.float64) if soft else torch.tensor([0, 2, -100, 1])
    weight = torch.rand(3, dtype=torch.float64) if weighted else None

    def loss(z: Tensor) -> Tensor:
        return rooted_loss(z, target, weight=weight, label_smoothing=smoothing)

    assert torch.autograd.gradgradcheck(loss, logits)


def test_the_hessian_of_the_plain_case_is_that_of_the_composed_one(
    batch: tuple[Tensor, Tensor],
) -> None:
    logits, target = batch
    plain = torch.autograd.functional.hessian(lambda z: rooted_loss(z, target), logits)
    other = torch.autograd.functional.hessian(
        lambda z: composed(z, target, Rooted(3.0), None, -100, 0.0, "mean"), logits
    )
    torch.testing.assert_close(plain, other, rtol=1e-10, atol=1e-13)


# torch differentiates its own nll_loss forward through torch.jit.script, which it deprecates.
torch_jit = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


@torch_jit
@pytest.mark.parametrize("link", [CE(), *LINKS], ids=str)
def test_func_grad_vmap_and_jvp_agree_with_autograd(link: Link) -> None:
    logits = torch.randn(7, 4, 5, dtype=torch.float64)
    target = torch.randint(0, 5, (7, 4))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return link_cross_entropy(z, y, link)

    each = torch.func.vmap(torch.func.grad(loss))(logits, target)
    tangent = torch.randn(4, 5, dtype=torch.float64)
    for i in range(7):
        z = logits[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, target[i]), z)
        torch.testing.assert_close(each[i], gradient, rtol=1e-12, atol=1e-14)
        _, forward = torch.func.jvp(lambda z, i=i: loss(z, target[i]), (logits[i],), (tangent,))
        torch.testing.assert_close(forward, (gradient * tangent).sum(), rtol=1e-11, atol=1e-14)


@torch_jit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_works_outside_of_func_too(dtype: torch.dtype) -> None:
    logits, tangent = torch.randn(4, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    target = torch.randint(0, 5, (4,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        forward = torch.autograd.forward_ad.unpack_dual(rooted_loss(dual, target)).tangent
    z = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(rooted_loss(z, target), z)
    torch.testing.assert_close(
        forward, (gradient * tangent).sum().float(), rtol=5 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_autocast_changes_neither_the_value_nor_its_dtype(options: dict[str, Any]) -> None:
    logits = torch.randn(6, 5).bfloat16().requires_grad_()
    target = torch.randint(0, 5, (6,))
    outside = rooted_loss(logits, target, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rooted_loss(logits, target, **options)
    inside.backward()
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)


def test_backward_can_run_twice_on_a_retained_graph() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(6, 5, dtype=dtype, requires_grad=True)
        loss = rooted_loss(logits, torch.randint(0, 5, (6,)))
        loss.backward(retain_graph=True)
        first = logits.grad
        assert first is not None
        logits.grad = None
        loss.backward()
        torch.testing.assert_close(logits.grad, first, rtol=0, atol=0)


def test_the_logits_may_be_changed_in_place_after_the_loss_as_with_cross_entropy() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    logits = x * 2.0
    target = torch.randint(0, 5, (6,))
    loss = rooted_loss(logits, target)
    logits.zero_()
    loss.backward()
    fresh = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(rooted_loss(fresh * 2.0, target), fresh)
    torch.testing.assert_close(x.grad, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    classes=st.integers(1, 60),
    shift=st.floats(-100.0, 100.0),
    seed=st.integers(0, 2**16),
)
def test_adding_a_number_to_all_logits_changes_nothing(
    rows: int, classes: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    for function in (rooted_loss, rooted_convex_loss, focal_loss):
        torch.testing.assert_close(
            function(logits + shift, target), function(logits, target), rtol=1e-9, atol=1e-12
        )


def test_every_public_name_is_there_and_documented() -> None:
    for name in rlo_core.__all__:
        thing = getattr(rlo_core, name)
        assert name.startswith("_") or thing.__doc__


def test_infinite_k_is_cross_entropy(batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    expected = F.cross_entropy(logits, target)
    for function in (rooted_loss, rooted_convex_loss):
        torch.testing.assert_close(function(logits, target, k=math.inf), expected)
