"""The fused loss against the plain one: the same number and gradients, whatever is asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from rlo_core import (
    CE,
    DFT,
    GCE,
    Focal,
    Link,
    LinkLinearCrossEntropy,
    Poly1,
    Rooted,
    RootedConvex,
    RootedLoss,
    link_cross_entropy,
    link_linear_cross_entropy,
    rooted_linear_loss,
)
from torch import Tensor


@dataclass(frozen=True)
class Squared(Link):
    """A link that the package does not know."""

    def value(self, ce: Tensor) -> Tensor:
        return ce**2

    def slope(self, ce: Tensor) -> Tensor:
        return 2 * ce


LINKS = [
    CE(),
    Rooted(2.0),
    Rooted(8.0, 10.0),
    RootedConvex(3.0, 2.0),
    Focal(),
    GCE(),
    DFT(),
    Poly1(),
]
LINKS += [Squared()]


def problem(
    tokens: int = 37, width: int = 16, classes: int = 101, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, bias and target, some of them ignored."""
    hidden = torch.randn(tokens, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, dtype=torch.float64) * 0.7).to(dtype).requires_grad_()
    bias = torch.randn(classes, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (tokens,))
    target[1::5] = -100
    return hidden, weight, bias, target


def gradients(loss: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """The loss, and the gradients of its weighted sum."""
    value = loss()
    pull = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad((value * pull).sum(), leaves)]


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_it_has_the_loss_and_gradients_of_link_cross_entropy(link, reduction, impl):
    """Every combination of the other options, against core's own function in float64."""
    hidden, weight, bias, target = problem()
    token_weight = torch.rand(len(target), dtype=torch.float64).requires_grad_()
    for smoothing, cap, with_bias, weighted in itertools.product(
        (0.0, 0.1), (None, 5.0), (False, True), (False, True)
    ):

        def oracle(
            smoothing: float = smoothing,
            cap: float | None = cap,
            with_bias: bool = with_bias,
            weighted: bool = weighted,
        ) -> Tensor:
            logits = F.linear(hidden, weight, bias if with_bias else None)
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            loss = link_cross_entropy(
                logits, target, link, label_smoothing=smoothing, reduction="none"
            )
            w = token_weight if weighted else torch.ones_like(loss)
            w = w.masked_fill(target == -100, 0.0)
            loss = loss * w
            if reduction == "none":
                return loss
            return loss.sum() if reduction == "sum" else loss.sum() / w.sum()

        leaves = [hidden, weight]
        leaves += [bias] if with_bias else []
        leaves += [token_weight] if weighted else []
        expected = gradients(oracle, *leaves)
        found = gradients(
            lambda smoothing=smoothing, cap=cap, with_bias=with_bias, weighted=weighted: (
                link_linear_cross_entropy(
                    hidden,
                    weight,
                    target,
                    link,
                    bias=bias if with_bias else None,
                    label_smoothing=smoothing,
                    softcap=cap,
                    token_weight=token_weight if weighted else None,
                    reduction=reduction,
                    impl=impl,
                    memory_budget=8 * 101 * 8,
                )
            ),
            *leaves,
        )
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_the_named_function_and_the_module_are_the_same_loss():
    hidden, weight, bias, target = problem()
    expected = link_linear_cross_entropy(hidden, weight, target, Rooted(5.0, 4.0), bias=bias)
    named = rooted_linear_loss(hidden, weight, target, k=5.0, m=4.0, bias=bias)
    module = LinkLinearCrossEntropy(RootedLoss(5.0, 4.0))(hidden, weight, target, bias=bias)
    assert named == expected
    assert module == expected
