"""The three terms: against the authors' formula and softplus, and at the ends of the range."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rlo_core.errors import SpecError
from rlo_core.registry import available_losses, create_loss, link_of
from rlo_stylegan.criterion import GanLoss
from rlo_stylegan.spec import gan_spec, notice

LOGITS = [-1e4, -100.0, -20.0, -3.0, -1e-3, 0.0, 0.5, 7.0, 20.5, 39.0]


def released(x: torch.Tensor, k: float) -> torch.Tensor:
    """The form of the authors' GAN code, whose value exceeds ours by k."""
    return k * (1 + torch.exp(x)) ** (1 / k)


@pytest.mark.parametrize("k", [1.0, 2.0, 4.0, 10.0])
def test_rlo_is_the_authors_loss_less_its_constant(k: float) -> None:
    x = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    ours, theirs = GanLoss(f"rlo:k={k:g}")(x, "G"), released(y, k)
    torch.testing.assert_close(ours, theirs - k, rtol=1e-12, atol=1e-14)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ce_is_softplus_bit_for_bit_with_its_gradient(dtype: torch.dtype) -> None:
    x = (torch.randn(1000) * 30).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = GanLoss("ce")(x, "D_real"), F.softplus(y)
    ours.mean().backward()
    theirs.mean().backward()
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("dtype", "first"), [(torch.float32, 88.8), (torch.float16, 11.1)], ids=["float32", "float16"]
)
def test_where_the_released_form_is_inf_then_nan_ours_is_finite(
    dtype: torch.dtype, first: float
) -> None:
    """A generator's logits of -90 ended the authors' published run: loss inf, then NaN."""
    logits = [first, first * 1.2, first * 10, 6e4]
    y = torch.tensor(logits, dtype=dtype, requires_grad=True)
    theirs = released(y, 2.0)
    theirs.sum().backward()
    assert theirs.isinf().all()
    assert not torch.isfinite(y.grad).any()
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    ours = GanLoss("rlo")(x, "G")
    ours.mean().backward()
    assert torch.isfinite(ours).all()
    assert torch.isfinite(x.grad).all()
    assert (ours.diff() > 0).all()
    assert (x.grad > 0).all()


@pytest.mark.parametrize("name", [n for n in available_losses() if link_of(create_loss(n))])
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_every_registered_loss_is_finite_for_any_float32_logit(name: str, x: float) -> None:
    logit = torch.tensor(x, requires_grad=True)
    loss = GanLoss(name)(logit, "G")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logit.grad)


@pytest.mark.parametrize("spec", ["rlo", "rlo:k=8", "rlo-bounded", "rlo-convex:k=3,m=1"])
def test_float32_gradient_is_the_slope_times_the_sigmoid(spec: str) -> None:
    x = torch.linspace(-80, 80, 321, requires_grad=True)
    loss = GanLoss(spec)
    loss(x, "G").sum().backward()
    wide = x.detach().double()
    exact = loss.link.slope(-F.logsigmoid(-wide)) * torch.sigmoid(wide)
    torch.testing.assert_close(x.grad.double(), exact, rtol=3e-5, atol=1e-37)


def test_it_reports_cross_entropy_and_slope_for_each_term_but_nothing_under_ce() -> None:
    told: dict[str, torch.Tensor] = {}
    x = torch.tensor([0.0, 2.0])
    GanLoss("ce", report=told.__setitem__)(x, "G")
    assert told == {}
    GanLoss("rlo", report=told.__setitem__)(x, "D_fake")
    assert sorted(told) == ["Loss/ce/D_fake", "Loss/slope/D_fake"]
    torch.testing.assert_close(told["Loss/ce/D_fake"], F.softplus(x))
    torch.testing.assert_close(told["Loss/slope/D_fake"], (1 + x.exp()).sqrt())


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ({"loss": "ce"}, "ce"),
        ({"loss": "rlo"}, "rlo-convex:k=2"),
        ({"loss": "rlo", "kparam": 4}, "rlo-convex:k=4"),
        ({"loss": "rlo:k=4"}, "rlo-convex:k=4"),
        ({"loss": "rlo", "kparam": 2, "mparam": 3}, "rlo-convex:k=2,m=3"),
        ({"loss": "rlo-convex"}, "rlo-convex:k=2"),
        ({"loss": "rlo-bounded", "kparam": 5}, "rlo-bounded:k=5"),
        ({"loss": "focal"}, "focal"),
        ({"loss": "focal:gamma=2"}, "focal:gamma=2"),
    ],
)
def test_flags_become_one_recorded_spec_that_reads_back_as_itself(
    flags: dict[str, object], recorded: str
) -> None:
    assert str(gan_spec(**flags)) == recorded
    assert str(gan_spec(recorded)) == recorded
    assert str(GanLoss(recorded).spec) == recorded


def test_bounded_is_what_the_rest_of_the_suite_calls_rlo() -> None:
    from rlo_core.links import Rooted

    assert GanLoss("rlo-bounded").link == Rooted(2.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": "ce", "kparam": 2}, "loss 'ce' takes no option 'k'; it takes none"),
        ({"loss": "rlo", "kparam": -1}, "loss 'rlo-convex:k=-1': k must be positive, got -1.0"),
        (
            {"loss": "rlo:k=3", "kparam": 2},
            "option 'k' is given twice, as 3 in 'rlo-convex:k=3' and as 2",
        ),
        (
            {"loss": "rlo:warmup=0.1"},
            "loss 'rlo-convex:k=2,warmup=0.1' has a schedule, and a GAN's training loop does not "
            "tell its loss how far the run is; leave warmup out",
        ),
    ],
)
def test_a_loss_that_cannot_be_is_refused_in_one_line(
    flags: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError) as error:
        GanLoss(gan_spec(**flags))
    assert str(error.value) == message


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"^unknown loss 'rol'; did you mean 'rlo'\? available: "):
        GanLoss("rol")


def test_a_loss_without_a_link_has_no_gan_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_loss.py").write_text(
        "from torch import nn\n\ndef make() -> nn.Module:\n    return nn.MultiMarginLoss()\n"
    )
    info = tmp_path / "own_loss-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-loss\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlo_core.losses]\nmargin = own_loss:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(SpecError) as error:
            GanLoss("margin")
    finally:
        sys.modules.pop("own_loss", None)
    assert str(error.value) == "loss 'margin' has no link, so it has no GAN form"


def test_the_user_is_told_which_rlo_runs_and_that_bounded_losses_vanish() -> None:
    assert notice(gan_spec("ce"), "ce") is None
    assert notice(gan_spec("rlo-convex"), "rlo-convex") is None
    assert notice(gan_spec("rlo"), "rlo") == (
        "loss 'rlo' is rlo-convex:k=2, the convex form, as in the authors' GAN code; "
        "the bounded form is 'rlo-bounded'"
    )
    assert notice(gan_spec("rlo-bounded"), "rlo-bounded") == (
        "loss 'rlo-bounded:k=2' is bounded: its gradient vanishes for a generator that is "
        "confidently beaten; watch Loss/slope/G in stats.jsonl, or take 'rlo-convex'"
    )
