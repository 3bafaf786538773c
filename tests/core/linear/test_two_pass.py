"""Two passes over blocks of classes: cost, memory, edges, and when they are chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from rlo_core import CE, Rooted, link_linear_cross_entropy, plan_linear_loss
from rlo_core.linear import blocks, two_pass
from rlo_core.linear.settings import Settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LINK = Rooted(3.0)


def problem(tokens: int = 40, width: int = 8, classes: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width).requires_grad_()
    weight = torch.randn(classes, width).requires_grad_()
    return hidden, weight, torch.randint(classes, (tokens,))


class Products(TorchDispatchMode):
    """Multiply-adds of matrix products, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.largest = 0, Counter[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.work += a.numel() * b.shape[1]
        if isinstance(out, Tensor):
            self.largest[out.dtype] = max(self.largest[out.dtype], out.numel())
        return out


@pytest.mark.parametrize(("trainable", "products"), [(True, 4), (False, 3)])
def test_the_logits_are_made_twice_and_no_float32_tensor_is_as_large_as_the_weight(
    trainable, products
):
    hidden, weight, target = (x.detach() for x in problem(64, 16, 1024))
    hidden = hidden.bfloat16().requires_grad_()
    weight = weight.bfloat16().requires_grad_(trainable)
    budget = 64 * 128 * 2
    with Products() as seen:
        loss = link_linear_cross_entropy(
            hidden, weight, target, LINK, impl="two-pass", memory_budget=budget
        )
        loss.backward()
    assert seen.work == products * 64 * 16 * 1024
    assert seen.largest[torch.float32] <= 64 * 128
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("classes", [1, 2, 29])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_number_of_tokens_and_classes_agrees_with_torch(tokens, classes, reduction):
    hidden, weight, target = problem(tokens, 5, classes)
    found = []
    for impl in ("torch", "two-pass"):
        loss = link_linear_cross_entropy(
            hidden, weight, target, LINK, reduction=reduction, impl=impl, memory_budget=64
        )
        found.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_ignored_tokens_may_hold_garbage():
    hidden, weight, target = problem()
    target[::3] = -100
    options: dict[str, Any] = {"impl": "two-pass", "memory_budget": 40 * 7 * 4}
    clean = link_linear_cross_entropy(hidden, weight, target, LINK, **options)
    dirty = hidden.detach().clone()
    dirty[::3] = torch.nan
    dirty.requires_grad_()
    loss = link_linear_cross_entropy(dirty, weight, target, LINK, **options)
    assert loss == clean
    dh, dw = torch.autograd.grad(loss, (dirty, weight))
    assert torch.isfinite(dw).all()
    assert (dh[::3] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_whose_logits_are_all_minus_infinity_come_first(smoothing):
    """As where the first block of a vocabulary is masked."""
    state = blocks.new_state(3, torch.zeros(1), torch.float32)
    settings = Settings(torch.float32, 8, label_smoothing=smoothing)
    logits = torch.randn(3, 8)
    logits[:, :4] = -torch.inf
    target = torch.tensor([5, 6, 4])
    for start in (0, 4):
        tile = logits[:, start : start + 4]
        blocks.statistics(tile, target, state, CE(), settings, first=start)
    rows = blocks.finished(state, target, settings, width=8)
    torch.testing.assert_close(
        rows.ce, torch.nn.functional.cross_entropy(logits, target, reduction="none")
    )


def test_a_label_that_is_no_class_is_a_loss_of_nan():
    """On CUDA nobody looks at the labels first."""
    hidden, weight, _ = problem(4, 3, 8)
    target = torch.tensor([0, 8, -1, 7])
    settings = Settings(torch.float32, 8, columns=3)
    loss, _ = two_pass.forward(hidden, weight, None, target, settings)
    assert torch.isnan(loss).tolist() == [False, True, True, False]


@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_the_weights_gradient_comes_in_float32_where_the_weight_asks_for_it(impl):
    hidden, weight, target = problem(200, 8, 31)
    low = weight.detach().bfloat16().requires_grad_()
    if not hasattr(low, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    low.grad_dtype = torch.float32
    link_linear_cross_entropy(
        hidden.bfloat16(), low, target, LINK, impl=impl, memory_budget=3000
    ).backward()
    assert low.grad.dtype == torch.float32
    exact = low.detach().double().requires_grad_()
    link_linear_cross_entropy(hidden.bfloat16().double(), exact, target, LINK).backward()
    off = (low.grad - exact.grad).norm() / exact.grad.norm()
    assert off < 8e-3
    assert not torch.equal(low.grad, low.grad.bfloat16().float())


def test_a_second_backward_pass_gives_the_same_gradients_and_a_second_derivative_is_refused():
    hidden, weight, target = problem()
    loss = link_linear_cross_entropy(hidden, weight, target, LINK, impl="two-pass")
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(slope.sum(), hidden)


@pytest.mark.parametrize(
    ("device", "dtype", "trainable", "impl", "reason"),
    [
        ("cpu", torch.bfloat16, True, "chunked", "gradients are finished in the forward pass"),
        ("meta", torch.bfloat16, True, "two-pass", "written once, in its own dtype"),
        ("meta", torch.float32, True, "chunked", "gradients are finished in the forward pass"),
        ("meta", torch.bfloat16, False, "chunked", "gradients are finished in the forward pass"),
    ],
)
def test_auto_takes_two_passes_where_the_weights_gradient_would_be_summed(
    device, dtype, trainable, impl, reason
):
    """Any device but a CPU; one chunk of float32 tokens has nothing to sum."""
    hidden = torch.empty(8, 16, dtype=dtype, device=device, requires_grad=True)
    weight = torch.empty(64, 16, dtype=dtype, device=device, requires_grad=trainable)
    plan = plan_linear_loss(hidden, weight, LINK)
    assert plan.impl == impl
    assert reason in plan.reason
    if impl == "two-pass":
        assert "logits of 64 classes at a time" in str(plan)
    many = torch.empty(1 << 16, 16, dtype=torch.float32, device="meta", requires_grad=True)
    wide = torch.empty(1 << 16, 16, dtype=torch.float32, device="meta", requires_grad=True)
    assert plan_linear_loss(many, wide, LINK).impl == "two-pass"


def test_torch_compile_keeps_the_two_passes_whole():
    hidden, weight, target = problem()

    def step(h: Tensor, w: Tensor) -> Tensor:
        return link_linear_cross_entropy(
            h, w, target, LINK, impl="two-pass", label_smoothing=0.1, memory_budget=40 * 7 * 4
        )

    expected = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)
