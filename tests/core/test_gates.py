"""Gates against their published formulas in float64, eager and fused."""

import math

import pytest
import torch
from rlo_core.errors import SpecError
from rlo_core.gates import GatedLoss, create_gate, row_statistics
from rlo_core.linear import gated_linear_cross_entropy
from rlo_core.links import CE, Rooted
from rlo_core.plugins import GATES, find_plugins
from rlo_core.registry import create_loss, link_of, parse_spec


def published(spec, logits, target, *, reference=None):
    """The objective of each row, with its gradient, from the formula of its source."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    own = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    ce, q = -own, own.exp().detach()
    if spec == "ce*eaft":
        top = p.detach().topk(min(20, p.shape[1])).values
        top = top / top.sum(-1, keepdim=True)
        return ce * (-(top * top.log()).sum(-1) / math.log(20))
    if spec == "ce*eaft:alpha=2,k=5,norm=3":
        top = p.detach().topk(5).values
        top = top / top.sum(-1, keepdim=True)
        return ce * (-(top * top.log()).sum(-1) / 3.0) ** 2
    if spec == "rlo:k=5*profit:tau=0.02":
        return 5 * (1 - own.exp() ** (1 / 5)) * (q > 0.02)
    if spec == "ce*threshold:low=0.01,high=0.1":
        return ce * ((q >= 0.01) & (q <= 0.1))
    if spec == "ce*entropy":
        return ce * (-(p * log_p).sum(-1).detach() / math.log(p.shape[1]))
    if spec == "ce*deft":
        a = (p**2).sum(-1).detach()
        return (1 - own.exp() ** a) / a  # another value, the same gradient
    if spec == "ce*topk:0.5":
        chosen = ce.detach() >= ce.detach().sort(descending=True).values[len(ce) // 2 - 1]
        return ce * chosen * 2.0
    if spec == "ce*rho:share=0.25":
        excess = (ce - reference).detach()
        chosen = excess >= excess.sort(descending=True).values[len(ce) // 4 - 1]
        return ce * chosen * 4.0
    assert spec == "dft*profit:0.01*entropy:alpha=0.5"
    h = -(p * log_p).sum(-1).detach() / math.log(p.shape[1])
    return q * ce * (q > 0.01) * h**0.5


SPECS = [
    "ce*eaft",
    "ce*eaft:alpha=2,k=5,norm=3",
    "rlo:k=5*profit:tau=0.02",
    "ce*threshold:low=0.01,high=0.1",
    "ce*entropy",
    "ce*deft",
    "ce*topk:0.5",
    "ce*rho:share=0.25",
    "dft*profit:0.01*entropy:alpha=0.5",
]


def problem(dtype=torch.float64, tokens=32, width=6, classes=40):
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, width, generator=g, dtype=dtype)
    weight = torch.randn(classes, width, generator=g, dtype=dtype)
    target = torch.randint(classes, (tokens,), generator=g)
    reference = torch.rand(tokens, generator=g, dtype=dtype) * 5
    return hidden.requires_grad_(), weight.requires_grad_(), target, reference


@pytest.mark.parametrize("spec", SPECS)
def test_an_eager_gate_has_the_gradient_of_its_published_formula(spec):
    hidden, weight, target, reference = problem()
    more = {"reference_ce": reference} if "rho" in spec else {}
    loss = create_loss(spec)(hidden @ weight.T, target, **more)
    got = torch.autograd.grad(loss, (hidden, weight))
    other = published(spec, hidden @ weight.T, target, reference=reference).mean()
    expected = torch.autograd.grad(other, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    if spec != "ce*deft":
        torch.testing.assert_close(loss, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("budget", [None, 1500])
@pytest.mark.parametrize("spec", SPECS)
def test_a_fused_gate_has_the_gradient_of_its_published_formula(spec, budget):
    """Ignored tokens, token weights, a bias, chunks of a few rows."""
    hidden, weight, target, reference = problem()
    bias = torch.linspace(-1, 1, 40, dtype=torch.float64, requires_grad=True)
    share = torch.linspace(-0.5, 2, 32, dtype=torch.float64)
    kept = torch.arange(32) % 8 != 3
    if "topk" in spec or "rho" in spec:
        kept = torch.arange(32) % 2 == 0
    criterion = create_loss(spec)
    loss, rows = gated_linear_cross_entropy(
        hidden,
        weight,
        target.masked_fill(~kept, -100),
        criterion.gated_link,
        criterion.gates,
        bias=bias,
        token_weight=share,
        reduction="mean",
        reference_ce=reference if "rho" in spec else None,
        statistics=("entropy", "correct"),
        memory_budget=budget,
    )
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    logits = hidden @ weight.T + bias
    other = published(spec, logits[kept], target[kept], reference=reference[kept]) * share[kept]
    expected = torch.autograd.grad(other.sum() / share[kept].sum(), (hidden, weight, bias))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    log_p = logits.detach().log_softmax(-1)
    torch.testing.assert_close(rows.entropy[kept], -(log_p.exp() * log_p).sum(-1)[kept])
    assert rows.correct[kept].tolist() == (logits.argmax(-1) == target)[kept].double().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_keep_their_digits_at_large_logits(dtype):
    logits = (torch.randn(8, 50, dtype=torch.float64) * 30 + 500).to(dtype)
    target = torch.arange(8)
    names = ("entropy", "top1", "sum_sq", "top_entropy", "correct")
    rows = row_statistics(logits, target, needs=names)
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    top = p.topk(20).values
    top = top / top.sum(-1, keepdim=True)
    expected = {
        "ce": -log_p.gather(1, target.unsqueeze(1)).squeeze(1),
        "entropy": -(p * log_p).sum(-1),
        "top1": p.amax(-1),
        "sum_sq": (p**2).sum(-1),
        "top_entropy": -(torch.special.xlogy(top, top)).sum(-1),
        "correct": (p.argmax(-1) == target).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(rows, name).double(), value, rtol=1e-4, atol=1e-5)


def test_a_ranking_gate_computes_the_other_products_over_the_chosen_rows_only(monkeypatch):
    from rlo_core.linear import chunks

    hidden, weight, target, _ = problem(tokens=40)
    counted = []
    rows = chunks._rows
    monkeypatch.setattr(
        chunks, "_rows", lambda tile, *a: counted.append(len(tile)) or rows(tile, *a)
    )
    gate = create_gate("topk", {"": "0.25"})
    gated_linear_cross_entropy(hidden, weight, target, CE(), [gate])
    assert counted == [40, 10]


def test_a_gate_is_part_of_the_one_spec_grammar():
    spec = parse_spec(" rlo:k=5 * profit:tau=0.3 * topk:0.6")
    assert str(spec) == "rlo:k=5*profit:tau=0.3*topk:0.6"
    assert str(spec.with_options(m=5.0)) == "rlo:k=5,m=5*profit:tau=0.3*topk:0.6"
    loss = create_loss(spec)
    assert isinstance(loss, GatedLoss)
    assert loss.gated_link == Rooted(5.0)
    assert link_of(loss) is None  # a host that knows links only refuses it
    assert set(find_plugins(GATES)) >= {"eaft", "profit", "threshold", "deft", "topk", "rho"}


def test_ignored_targets_and_reductions_are_those_of_cross_entropy():
    logits = torch.randn(2, 5, 3)
    target = torch.tensor([[1, -100, 2], [0, 4, -100]])
    none = create_loss("ce*profit:0", reduction="none")(logits, target)
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(none, ce)
    mean = create_loss("ce*profit:0")(logits, target)
    torch.testing.assert_close(mean, torch.nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ce*eaf", r"^unknown gate 'eaf'; did you mean 'eaft'\?"),
        ("ce*topk:0", r"^gate 'topk': share must be in \(0, 1\], got 0.0$"),
        ("ce*profit:k=3", r"^gate 'profit' takes no option 'k'; it takes tau$"),
        ("ce*profit:tau=x", r"^option 'tau' of gate 'profit' must be a number, got 'x'$"),
        ("ce*profit:0.1,tau=0.2", r"^gate 'profit' is given option 'tau' twice$"),
        ("ce*", r"^loss spec must be NAME or NAME:option=value,..., got 'ce\*'$"),
        ("ce*eaft*eaft:k=5", r"^gates of one loss must have one k, got \[5, 20\]$"),
    ],
)
def test_what_a_gate_cannot_be_is_said(spec, message):
    with pytest.raises(SpecError, match=message):
        create_loss(spec)


def test_what_a_gated_loss_cannot_honour_is_refused():
    with pytest.raises(
        SpecError, match=r"^loss 'ce\*deft' cannot honour label_smoothing=0.1: it h"
    ):
        create_loss("ce*deft", label_smoothing=0.1)
    hidden, weight, target, _ = problem()
    with pytest.raises(
        SpecError, match=r"^this gate needs a reference model: reference_ce was not"
    ):
        gated_linear_cross_entropy(hidden, weight, target, CE(), [create_gate("rho", {})])
    with pytest.raises(
        SpecError, match=r"^this host cannot give the statistic 'reference_ce' that"
    ):
        create_loss("ce*rho")(hidden @ weight.T, target)
