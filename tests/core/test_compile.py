"""Under torch.compile: one graph, few recompilations, the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from rlo_core import RootedConvexLoss, RootedLoss, create_loss, link_cross_entropy
from rlo_core.links import Focal, Rooted
from torch import Tensor


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["rlo:k=8,m=10", "rlo-convex", "focal"])
def test_one_graph_gives_the_eager_loss_and_gradient(spec: str, dtype: torch.dtype) -> None:
    criterion = create_loss(spec)
    logits = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found, expected = compiled(logits, target), criterion(logits, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, logits), gradient_of(expected, logits))


@pytest.mark.parametrize("kind", [RootedLoss, RootedConvexLoss])
def test_a_moving_k_recompiles_at_most_twice(
    kind: type[RootedLoss] | type[RootedConvexLoss],
) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    criterion = kind(3.0)
    compiled = torch.compile(criterion, fullgraph=True, backend=counting)
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    for k in (3.0, 3.5, 4.0, 5.0, 8.0, 13.0):
        criterion.k = k
        torch.testing.assert_close(compiled(logits, target), kind(k)(logits, target))
    assert graphs <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("link", [Rooted(8.0, 10.0), Focal()], ids=str)
def test_inductor_gives_the_eager_loss_and_gradient(
    link: Rooted | Focal, dtype: torch.dtype
) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return link_cross_entropy(logits, target, link)

    logits = torch.randn(64, 100, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 100, (64,))
    compiled = torch.compile(loss, fullgraph=True)
    found, expected = compiled(logits, target), loss(logits, target)
    torch.testing.assert_close(found, expected)
    unit = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        gradient_of(found, logits), gradient_of(expected, logits), rtol=max(unit, 1e-5), atol=1e-6
    )
