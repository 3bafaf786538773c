"""What a training loop relies on: edges, cost, autocast, accumulation, checkpointing, compiling."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import rlo_core.linear.chunks as chunks
import torch
import torch.nn.functional as F
from rlo_core import (
    CE,
    LinkLinearCrossEntropy,
    Rooted,
    RootedConvex,
    RootedLoss,
    link_linear_cross_entropy,
    plan_linear_loss,
    set_progress,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

LINK = Rooted(3.0)


def problem(tokens: int = 40, width: int = 8, classes: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width).requires_grad_()
    weight = torch.randn(classes, width).requires_grad_()
    return hidden, weight, torch.randint(classes, (tokens,))


def both(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> None:
    """Chunked equals torch, for the loss and both gradients."""
    found = []
    for impl in ("torch", "chunked"):
        loss = link_linear_cross_entropy(hidden, weight, target, LINK, impl=impl, **options)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        found.append((loss, *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


class Record(TorchDispatchMode):
    """Counts matrix products and keeps the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.rows = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.products["products"] += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [1, 2, 39])
def test_any_number_of_tokens_and_an_odd_vocabulary_agree_with_torch(tokens, reduction):
    both(*problem(tokens, 7, 29), reduction=reduction, memory_budget=4 * 29 * 4)


@pytest.mark.parametrize("impl", ["chunked", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_kept_token_gives_nan_for_mean_and_zero_gradients(impl, reduction, tokens):
    """A batch that was truncated before its answer must not poison the weights."""
    hidden, weight, target = problem(tokens)
    target.fill_(-100)
    loss = link_linear_cross_entropy(hidden, weight, target, LINK, reduction=reduction, impl=impl)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert torch.isnan(loss).all() if reduction == "mean" else (loss == 0).all()
    assert all((g == 0).all() for g in grads)


def test_ignored_tokens_may_hold_garbage():
    """Padding can be anything, NaN too, dropped or masked."""
    hidden, weight, target = problem()
    target[::3] = -100
    clean = link_linear_cross_entropy(hidden, weight, target, LINK)
    dirty = hidden.detach().clone()
    dirty[::3] = torch.nan
    dirty.requires_grad_()
    loss = link_linear_cross_entropy(dirty, weight, target, LINK)
    assert loss == clean
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masking_rows_is_the_same_as_dropping_them(monkeypatch, smoothing):
    """Elsewhere than on the CPU rows are masked, since counting them would wait for the device."""
    hidden, weight, target = problem()
    target[::3] = -100
    monkeypatch.setattr(chunks, "drops_ignored", lambda device: False)
    both(hidden, weight, target, label_smoothing=smoothing, memory_budget=7 * 31 * 4)
    dirty = hidden.detach().clone()
    dirty[::3] = torch.nan
    dirty.requires_grad_()
    grads = torch.autograd.grad(
        link_linear_cross_entropy(dirty, weight, target, LINK, label_smoothing=smoothing),
        (dirty, weight),
    )
    assert all(torch.isfinite(g).all() for g in grads)


def test_inputs_may_be_non_contiguous_and_batched():
    hidden = torch.randn(8, 5, 6).transpose(0, 2).requires_grad_()  # (6, 5, 8)
    weight = torch.randn(8, 31).t().requires_grad_()
    target = torch.randint(31, (5, 6)).t()
    target[0, 1] = -100
    both(hidden, weight, target)
    both(hidden, weight, target, shift=True)
    both(hidden, weight, target, reduction="none", shift=True)


def test_shift_predicts_the_next_token():
    hidden = torch.randn(2, 6, 8)
    weight, target = torch.randn(31, 8), torch.randint(31, (2, 6))
    weights = torch.rand(2, 6)
    found = link_linear_cross_entropy(
        hidden, weight, target, LINK, shift=True, reduction="none", token_weight=weights
    )
    expected = link_linear_cross_entropy(
        hidden[:, :-1], weight, target[:, 1:], LINK, reduction="none", token_weight=weights[:, 1:]
    )
    assert found.shape == (2, 5)
    torch.testing.assert_close(found, expected)


def test_logits_of_all_tokens_never_exist_and_every_chunk_costs_three_products():
    hidden, weight, target = problem(64, 8, 101)
    for trainable, per_chunk in ((True, 3), (False, 2)):
        weight.requires_grad_(trainable)
        with Record() as record:
            link_linear_cross_entropy(
                hidden, weight, target, LINK, impl="chunked", memory_budget=16 * 101 * 4
            ).backward()
        assert record.largest == 16 * 101
        assert record.products["products"] == 4 * per_chunk


def test_ignored_tokens_cost_nothing():
    """Half of the tokens ignored: half of the chunks."""
    hidden, weight, target = problem(64, 8, 101)
    target[::2] = -100
    with Record() as record:
        link_linear_cross_entropy(
            hidden, weight, target, LINK, impl="chunked", memory_budget=16 * 101 * 4
        ).backward()
    assert record.products["products"] == 2 * 3


def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, target = problem(64, 8, 101)
    with Record() as record, torch.no_grad():
        link_linear_cross_entropy(hidden, weight, target, LINK, memory_budget=16 * 101 * 4)
    assert record.products["products"] == 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(reduction):
    hidden, weight, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = link_linear_cross_entropy(hidden, weight, target, LINK, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = link_linear_cross_entropy(*half, target, LINK, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    for found, other in zip(grads, torch.autograd.grad(expected.sum(), half), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, other.float(), rtol=2e-2, atol=1e-3)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    hidden, weight, target = problem()
    target[::7] = -100
    whole = link_linear_cross_entropy(hidden, weight, target, LINK, reduction="sum")
    (expected,) = torch.autograd.grad(whole, weight)
    for part in (slice(0, 11), slice(11, 40)):
        link_linear_cross_entropy(
            hidden.detach()[part], weight, target[part], LINK, reduction="sum"
        ).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_backward_twice_with_the_graph_kept_gives_the_same_gradient_twice():
    hidden, weight, target = problem()
    loss = link_linear_cross_entropy(hidden, weight, target, LINK)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert not first.requires_grad
    kept = first.clone()
    torch.testing.assert_close(
        torch.autograd.grad(loss * 3, weight, retain_graph=True)[0], kept * 3
    )
    loss.backward()
    loss = link_linear_cross_entropy(hidden, weight, target, LINK)
    loss.backward()
    torch.testing.assert_close(weight.grad, kept * 2)
    torch.testing.assert_close(first, kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    hidden, weight, target = problem()
    layer = nn.Linear(8, 8)

    def block(x: Tensor) -> Tensor:
        return link_linear_cross_entropy(torch.tanh(layer(x)), weight, target, LINK)

    expected = torch.autograd.grad(block(hidden), (hidden, weight, layer.weight))
    loss = checkpoint(block, hidden, use_reentrant=reentrant)
    loss.backward()
    for found, other in zip((hidden.grad, weight.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by", ["hidden", "weight"])
def test_a_second_derivative_is_refused_with_the_way_out(reduction, by):
    hidden, weight, target = problem()
    leaf = {"hidden": hidden, "weight": weight}[by]
    loss = link_linear_cross_entropy(hidden, weight, target, LINK, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    message = r"^a fused loss can be differentiated only once; pass impl='torch' for a second der"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(grad.sum(), leaf)
    loss = link_linear_cross_entropy(hidden, weight, target, LINK, impl="torch")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.sum(), leaf)[0]).all()


def test_torch_func_grad_is_the_gradient():
    hidden, weight, target = problem()
    found = torch.func.grad(lambda w: link_linear_cross_entropy(hidden, w, target, LINK))(weight)
    loss = link_linear_cross_entropy(hidden, weight, target, LINK)
    torch.testing.assert_close(found, torch.autograd.grad(loss, weight)[0])


def test_a_criterion_with_a_schedule_is_followed():
    hidden, weight, target = problem()
    criterion = RootedLoss(2.0, warmup=0.5)
    module = LinkLinearCrossEntropy(criterion)
    plain = F.cross_entropy(hidden @ weight.t(), target)
    torch.testing.assert_close(module(hidden, weight, target), plain)
    set_progress(module, 1.0)
    expected = link_linear_cross_entropy(hidden, weight, target, Rooted(2.0))
    torch.testing.assert_close(module(hidden, weight, target), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "gradients are finished in the forward pass, chunk by chunk"),
        ({"reduction": "none"}, "logits are computed per chunk, and again in the backward pass"),
        ({"impl": "torch"}, "asked for"),
    ],
)
def test_explain_says_what_was_chosen_and_why(capsys, options, reason):
    hidden, weight, target = problem(1100, 4, 31)
    link_linear_cross_entropy(hidden, weight, target, LINK, explain=True, **options)
    said = capsys.readouterr().err
    assert reason in said
    rows = 1100 if options.get("impl") == "torch" else 512
    assert f"logits of {rows} of 1100 tokens at a time, {rows * 31 * 4 / 1e6:.1f} MB" in said


@pytest.mark.parametrize(("budget", "rows"), [(None, 512), (31 * 4 * 300, 256), (1, 1), (620, 5)])
def test_the_memory_budget_sets_the_rows_of_a_chunk(budget, rows):
    hidden, weight, _ = problem(2000, 4, 31)
    assert plan_linear_loss(hidden, weight, LINK, memory_budget=budget).rows == rows


@pytest.mark.parametrize("link", [Rooted(3.0), RootedConvex(3.0, 2.0), CE()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_graph_break_it_is_the_same(link, reduction):
    hidden, weight, target = problem()
    target[::4] = -100

    def step(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return link_linear_cross_entropy(h * 2, w, y, link, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(hidden, weight, target), (hidden, weight))
    found = torch.autograd.grad(compiled(hidden, weight, target), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_scheduled_k_does_not_compile_anew_at_every_step():
    from torch._dynamo.testing import CompileCounterWithBackend

    hidden, weight, target = problem()
    module = LinkLinearCrossEntropy(RootedLoss(8.0, warmup=1.0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(6):
        set_progress(module, step / 6)
        torch.testing.assert_close(compiled(hidden, weight, target), module(hidden, weight, target))
    assert counter.frame_count <= 3
