"""The table of links, in float64 and in the float32 that training uses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlo_core._cross_entropy import apply_link
from rlo_core.links import (
    CE,
    CONVEX_LINEAR_FROM,
    DFT,
    GCE,
    Focal,
    Link,
    Poly1,
    Rooted,
    RootedConvex,
)
from torch import Tensor

KS = [0.25, 1.0, 3.0, 8.0, 64.0, 1e4, 1e9]
GAPS = [0.0, 1e-8, 1e-3, 1.0, 17.0, 20.0, 60.0, 88.0, 104.0, 1e4, 3e38]
LINKS: list[Link] = [
    CE(),
    *(Rooted(k) for k in KS),
    *(RootedConvex(k) for k in KS),
    Rooted(8.0, 10.0),
    RootedConvex(2.0, 1.0),
    Rooted(math.inf),
    RootedConvex(math.inf),
    Focal(),
    Focal(0.0, 1.0),
    Focal(0.5),
    Focal(2.0),
    GCE(),
    GCE(1.0),
    DFT(),
    Poly1(),
    Poly1(-1.0),
]

# The table as it is written in the papers, in terms of the probability.
TABLE: list[tuple[Link, Callable[[Tensor], Tensor]]] = [
    (CE(), lambda p: -p.log()),
    (Rooted(3.0), lambda p: 3.0 * (1.0 - p ** (1.0 / 3.0))),
    (Rooted(8.0, 10.0), lambda p: 10.0 * (1.0 - p ** (1.0 / 8.0))),
    (RootedConvex(3.0), lambda p: 3.0 * (p ** (-1.0 / 3.0) - 1.0)),
    (RootedConvex(2.0, 5.0), lambda p: 5.0 * (p ** (-1.0 / 2.0) - 1.0)),
    (Focal(), lambda p: -0.25 * (1.0 - p) ** 3.0 * p.log()),
    (Focal(0.5, 1.0), lambda p: -((1.0 - p) ** 0.5) * p.log()),
    (GCE(), lambda p: (1.0 - p**0.7) / 0.7),
    (DFT(), lambda p: -p.detach() * p.log()),
    (Poly1(2.0), lambda p: -p.log() + 2.0 * (1.0 - p)),
]


@pytest.mark.parametrize(("link", "formula"), TABLE, ids=[str(link) for link, _ in TABLE])
def test_value_and_slope_are_those_of_the_formula_in_p(
    link: Link, formula: Callable[[Tensor], Tensor]
) -> None:
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    expected = formula(p)
    (by_p,) = torch.autograd.grad(expected.sum(), p)
    ce = -p.detach().log()
    torch.testing.assert_close(link.value(ce), expected.detach(), rtol=1e-12, atol=1e-14)
    # d loss / d ce = d loss / d p * d p / d ce, and p = e^-ce.
    torch.testing.assert_close(link.slope(ce), -by_p * p.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_value_and_slope_are_finite_in_float32(link: Link, gap: float) -> None:
    ce = torch.tensor(gap)
    assert torch.isfinite(link.value(ce))
    assert torch.isfinite(link.slope(ce))


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_float32_is_accurate_wherever_float64_fits(link: Link) -> None:
    """Relative to float64 at the same argument; 2e-5 is e^x with x near 100 rounded in float32."""
    ce = torch.cat([torch.logspace(-8, 4, 400), torch.zeros(1)])
    if link == Poly1(-1.0):  # ce - (1 - p) is ce^2 / 2 near 0: the loss itself cancels there
        ce = ce[ce > 0.1]
    for computed, exact in (
        (link.value(ce), link.value(ce.double())),
        (link.slope(ce), link.slope(ce.double())),
    ):
        kept = (exact.abs() > 1e-36) & (exact.abs() < 3e38) | (exact == 0)
        torch.testing.assert_close(
            computed[kept].double(), exact[kept], rtol=2e-5, atol=0, msg=lambda m: f"{link}\n{m}"
        )


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 60.0, 100.0, 1e4])
@pytest.mark.parametrize("k", [0.25, 1.0, 3.0, 64.0, 1e9])
def test_float32_gradient_is_the_closed_form_and_not_that_of_expm1(gap: float, k: float) -> None:
    """gradcheck is float64 and cannot see this: result + 1 is 0 in float32 from ce/k = 17 on."""
    ce = torch.tensor(gap, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply_link(ce, Rooted(k)), ce)
    assert gradient.item() == pytest.approx(math.exp(-gap / k), rel=2e-5, abs=1e-40)


@pytest.mark.parametrize("k", KS)
def test_the_convex_link_goes_on_as_its_tangent(k: float) -> None:
    link = RootedConvex(k)
    edge = CONVEX_LINEAR_FROM * k
    ce = torch.tensor([edge * 0.999, edge, edge * 1.001, edge * 2.0], dtype=torch.float64)
    slope = link.slope(ce)
    assert slope[0] < slope[1] == slope[2] == slope[3]
    value = link.value(ce)
    assert bool((value.diff() > 0).all())
    expected = value[1] + slope[1] * (ce[3] - ce[1])
    torch.testing.assert_close(value[3], expected, rtol=1e-12, atol=0)


def test_the_square_of_the_steepest_convex_slope_is_finite_in_float32() -> None:
    """Adam keeps squares of gradients."""
    assert torch.isfinite(RootedConvex(1.0).slope(torch.tensor(1e30)) ** 2)


@given(
    low=st.floats(0.0, 200.0, width=32),
    high=st.floats(0.0, 200.0, width=32),
    number=st.integers(0, len(LINKS) - 1),
)
def test_links_start_at_zero_and_do_not_decrease(low: float, high: float, number: int) -> None:
    link = LINKS[number]
    assert link.value(torch.zeros(())).item() == 0.0
    if isinstance(link, DFT):  # ce e^-ce is no primitive of its slope: the stop-gradient is DFT
        return
    lower, higher = link.value(torch.tensor(sorted([low, high]))).tolist()
    assert lower <= higher + 2e-6 * abs(higher)
    assert link.slope(torch.tensor(low)).item() >= 0.0


@pytest.mark.parametrize("form", [Rooted, RootedConvex])
def test_both_rooted_forms_tend_to_cross_entropy_from_their_own_side(
    form: type[Rooted] | type[RootedConvex],
) -> None:
    ce = torch.linspace(0.1, 10.0, 50, dtype=torch.float64)
    gaps = [form(k).value(ce) - ce for k in (10.0, 1e3, 1e5)]
    side = -1.0 if form is Rooted else 1.0
    for gap in gaps:
        assert bool((side * gap > 0).all())
    for wider, closer in itertools.pairwise(gaps):
        assert bool((closer.abs() < wider.abs()).all())
    torch.testing.assert_close(form(1e9).value(ce), ce, rtol=1e-7, atol=0)
    torch.testing.assert_close(form(math.inf).value(ce), ce, rtol=0, atol=0)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 1.0])
def test_gce_is_the_bounded_form_with_k_and_m_of_1_over_q(q: float) -> None:
    ce = torch.linspace(0.0, 30.0, 100, dtype=torch.float64)
    for part in ("value", "slope"):
        found, expected = getattr(GCE(q), part)(ce), getattr(Rooted(1 / q, 1 / q), part)(ce)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_dft_has_the_gradient_of_the_bounded_form_with_k_and_m_of_1() -> None:
    ce = torch.linspace(0.0, 30.0, 100, dtype=torch.float64)
    torch.testing.assert_close(DFT().slope(ce), Rooted(1.0, 1.0).slope(ce), rtol=1e-15, atol=0)


@pytest.mark.parametrize("k", [1.5, 3.0, 8.0])
def test_both_forms_are_alpha_losses(k: float) -> None:
    """alpha/(alpha-1) (1 - p^(1-1/alpha)), Sypherd et al., with alpha = k/(k-1) and k/(k+1)."""

    def alpha_loss(p: Tensor, alpha: float) -> Tensor:
        return alpha / (alpha - 1.0) * (1.0 - p ** (1.0 - 1.0 / alpha))

    p = torch.linspace(0.01, 1.0, 100, dtype=torch.float64)
    torch.testing.assert_close(Rooted(k).value(-p.log()), alpha_loss(p, k / (k - 1.0)))
    torch.testing.assert_close(RootedConvex(k).value(-p.log()), alpha_loss(p, k / (k + 1.0)))


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Rooted(0.0), ValueError, "k must be positive, got 0.0"),
    (lambda: Rooted(-3), ValueError, "k must be positive, got -3"),
    (lambda: Rooted(math.nan), ValueError, "k must be positive, got nan"),
    (lambda: Rooted("3"), TypeError, "k must be a number, got '3'"),  # type: ignore[arg-type]
    (lambda: Rooted(True), TypeError, "k must be a number, got True"),
    (lambda: Rooted(3, 0.0), ValueError, "m must be positive, got 0.0"),
    (lambda: Rooted(3, math.nan), ValueError, "m must be positive, got nan"),
    (lambda: RootedConvex(3, -1), ValueError, "m must be positive, got -1"),
    (
        lambda: RootedConvex(3, math.inf),
        ValueError,
        "m must be finite, got inf; leave it out for m = k",
    ),
    (lambda: Rooted(math.inf, 2), ValueError, "m must be left out when k is inf, got 2"),
    (lambda: Focal(-1.0), ValueError, "gamma must be at least 0, got -1.0"),
    (lambda: Focal(math.nan), ValueError, "gamma must be finite, got nan"),
    (lambda: Focal(2.0, 0.0), ValueError, "alpha must be positive, got 0.0"),
    (lambda: GCE(0.0), ValueError, "q must be positive, got 0.0"),
    (lambda: GCE(math.inf), ValueError, "q must be finite, got inf"),
    (
        lambda: Poly1(-2.0),
        ValueError,
        "eps must be at least -1 for the loss to increase, got -2.0",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED, ids=[r[2] for r in REFUSED])
def test_a_refused_option_is_named_with_what_it_must_be(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == words
