"""Log-probabilities of a linear layer without its logits, against log_softmax in float64."""

import pytest
import torch
from rlo_core.linear import linear_log_probs


def numbers(*, tokens=23, width=8, classes=61, bias=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(classes, width, generator=g)
    target = torch.randint(classes, (tokens,), generator=g)
    target[::5] = -100
    share = torch.randn(tokens, generator=g)
    share[1:9] = 0.0  # what a clipped ratio or an advantage of zero leaves
    return hidden, weight, torch.randn(classes, generator=g) if bias else None, target, share


def oracle(hidden, weight, bias, target, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    kept = target != -100
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1).where(kept, 0.0)
    return own, log_p, logits


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [None, 5 * 61 * 4])
def test_values_and_gradients_are_those_of_log_softmax(bias, softcap, budget):
    hidden, weight, b, target, share = numbers(bias=bias)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    doubles = [x.double().requires_grad_() for x in leaves]
    for x in leaves:
        x.requires_grad_()
    got, rows = linear_log_probs(
        hidden,
        weight,
        target,
        bias=b,
        softcap=softcap,
        statistics=("entropy", "correct", "sum_sq", "mean_logit"),
        memory_budget=budget,
    )
    wide_bias = doubles[2] if bias else None
    expected, log_p, logits = oracle(doubles[0], doubles[1], wide_bias, target, softcap)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    kept, p = target != -100, log_p.exp()
    for found, value in (
        (rows.entropy, -(p * log_p).sum(1)),
        (rows.correct, (log_p.argmax(1) == target).double()),
        (rows.sum_sq, (p * p).sum(1)),
        (rows.mean_logit, logits.mean(1)),
    ):
        torch.testing.assert_close(found[kept].double(), value[kept], rtol=1e-5, atol=1e-5)
    (got.exp() * share).sum().backward()
    (expected.exp() * share).sum().backward()
    for x, wide in zip(leaves, doubles, strict=True):
        assert (x.grad - wide.grad).norm() < 3e-6 * wide.grad.norm()


def test_a_frozen_layer_is_not_computed_again(monkeypatch):
    from rlo_core.linear import log_probs

    hidden, weight, _, target, share = numbers()
    calls, run = [], log_probs.run_chunks
    monkeypatch.setattr(log_probs, "run_chunks", lambda *a, **k: calls.append(1) or run(*a, **k))
    hidden.requires_grad_()
    got, _ = linear_log_probs(hidden, weight, target)
    (got * share).sum().backward()
    assert len(calls) == 1
    wide = hidden.detach().double().requires_grad_()
    (oracle(wide, weight.double(), None, target, None)[0] * share).sum().backward()
    assert (hidden.grad - wide.grad).norm() < 3e-6 * wide.grad.norm()


def test_a_second_derivative_is_refused():
    hidden, weight, _, target, _ = numbers()
    hidden.requires_grad_()
    (first,) = torch.autograd.grad(
        linear_log_probs(hidden, weight, target)[0].sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"^a fused loss can be differentiated only once"):
        first.sum().backward()


@pytest.mark.parametrize("target", [torch.full((23,), -100), torch.zeros(0, dtype=torch.int64)])
def test_no_label_gives_zeros_and_zero_gradients(target):
    hidden, weight, *_ = numbers(tokens=len(target))
    hidden.requires_grad_()
    weight.requires_grad_()
    got, _ = linear_log_probs(hidden, weight, target)
    got.sum().backward()
    assert not got.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()
