"""`+kl` against its formula in float64, eager and without logits; and its place in the grammar."""

import pytest
import torch
from rlo_core.errors import SpecError
from rlo_core.linear import linear_kl_divergence
from rlo_core.registry import create_loss, link_of, parse_spec
from rlo_core.terms import AnchoredLoss


def asft(logits, target, reference, *, beta, temperature):
    """DFT + beta T^2 KL(q_T || p_T), of each row, by the definition."""
    own = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    p, q = (logits / temperature).softmax(-1), (reference / temperature).softmax(-1)
    divergence = (q * (q / p).log()).sum(-1)
    return -own.exp().detach() * own + beta * temperature**2 * divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_anchored_finetuning_has_the_gradient_of_its_formula(temperature):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 13, generator=g).mul(3).requires_grad_()
    reference = torch.randn(9, 13, generator=g).mul(3)
    target = torch.randint(13, (9,), generator=g)
    target[2] = -100
    loss = create_loss(f"dft+kl:beta=0.3,temperature={temperature}")
    got = loss(logits, target, reference_logits=reference)
    got.backward()
    wide = logits.detach().double().requires_grad_()
    kept = target != -100
    rows = asft(
        wide[kept], target[kept], reference[kept].double(), beta=0.3, temperature=temperature
    )
    rows.mean().backward()
    assert got.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    assert (logits.grad - wide.grad).norm() < 3e-6 * wide.grad.norm()
    each = create_loss(f"dft+kl:beta=0.3,temperature={temperature}", reduction="none")
    found = each(logits, target, reference_logits=reference)
    torch.testing.assert_close(found[kept].double(), rows.detach(), rtol=1e-5, atol=1e-6)
    assert found[2] == 0


@pytest.mark.parametrize("budget", [None, 3000])
@pytest.mark.parametrize(("softcap", "bias"), [(None, True), (4.0, False)])
def test_without_logits_value_and_gradients_are_those_of_the_formula(budget, softcap, bias):
    """The reference is narrower, has a cap of its own, and both have weights of tokens."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(21, 6, generator=g), torch.randn(31, 6, generator=g)
    states, other = torch.randn(21, 4, generator=g), torch.randn(31, 4, generator=g)
    share, offset = torch.randn(21, generator=g), torch.randn(31, generator=g) if bias else None
    leaves = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    got = linear_kl_divergence(
        hidden,
        weight,
        (states, other, None, 2.0),
        bias=offset,
        softcap=softcap,
        temperature=1.5,
        token_weight=share,
        memory_budget=budget,
    )
    (3 * got).backward()
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    z = doubles[0] @ doubles[1].t() + (doubles[2] if bias else 0.0)
    z = z if softcap is None else softcap * (z / softcap).tanh()
    p = (z / 1.5).softmax(-1)
    q = (2.0 * (states.double() @ other.double().t() / 2.0).tanh() / 1.5).softmax(-1)
    expected = ((q * (q / p).log()).sum(-1) * share).sum()
    (3 * expected).backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for x, wide in zip(leaves, doubles, strict=True):
        assert (x.grad - wide.grad).norm() < 3e-6 * wide.grad.norm()


def test_a_term_is_part_of_the_one_spec_grammar():
    spec = parse_spec("rlo:k=1e+1*profit:0.3+kl:beta=0.1")
    assert str(spec) == "rlo:k=1e+1*profit:0.3+kl:beta=0.1"
    assert parse_spec(str(spec)) == spec
    assert [term.name for term in spec.terms] == ["kl"]
    criterion = create_loss("ce+kl:0.5")
    assert isinstance(criterion, AnchoredLoss)
    assert criterion.terms[0].beta == 0.5
    assert link_of(criterion) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ce+kll", r"^unknown term 'kll'; available: kl$"),
        ("ce+kl:gamma=1", r"^term 'kl' takes no option 'gamma'; it takes beta, temperature$"),
        ("ce+kl:beta=x", r"^option 'beta' of term 'kl' must be a number, got 'x'$"),
        ("ce+kl:beta=-1", r"^term 'kl': beta must be positive and finite, got -1.0$"),
    ],
)
def test_what_a_term_cannot_be_is_said(spec, message):
    with pytest.raises(SpecError, match=message):
        create_loss(spec)


def test_a_term_without_its_reference_is_refused():
    with pytest.raises(SpecError, match=r"^a loss with '\+kl' needs a reference model, and none"):
        create_loss("ce+kl")(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^the reference must have 2 tokens and 3 classes, got 2"):
        linear_kl_divergence(
            torch.zeros(2, 4), torch.zeros(3, 4), (torch.zeros(2, 4), torch.zeros(5, 4), None, None)
        )
