"""Every registered loss, in every form of its arguments, under everything torch can do to it.

The oracle is the formula in float64, written with torch's own operations: autograd and torch.func
know nothing of it but exp, log and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rlo_core import link_cross_entropy, link_linear_cross_entropy
from rlo_core.links import BUILT_IN, CE, DFT, GCE, Focal, Link, Poly1, Rooted, RootedConvex
from rlo_core.registry import create_loss
from torch import Tensor, func
from torch._subclasses import FakeTensorMode

# torch differentiates some of its operations forward through torch.jit.script, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

CLASSES, ROWS = 5, 3


@dataclass(frozen=True)
class Loss:
    """A loss of the registry and its formula."""

    spec: str
    link: Link
    formula: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return self.spec


LOSSES = [
    Loss("ce", CE(), lambda ce: ce),
    Loss("rlo:k=2", Rooted(2.0), lambda ce: 2 * (1 - torch.exp(-ce / 2))),
    Loss("rlo:k=8,m=10", Rooted(8.0, 10.0), lambda ce: 10 * (1 - torch.exp(-ce / 8))),
    Loss("rlo-convex:k=3,m=2", RootedConvex(3.0, 2.0), lambda ce: 2 * (torch.exp(ce / 3) - 1)),
    Loss("focal", Focal(), lambda ce: 0.25 * (1 - torch.exp(-ce)) ** 3 * ce),
    Loss("focal:gamma=0.5,alpha=1", Focal(0.5, 1.0), lambda ce: (1 - torch.exp(-ce)) ** 0.5 * ce),
    Loss("gce", GCE(), lambda ce: (1 - torch.exp(-0.7 * ce)) / 0.7),
    # The gradient of DFT, which is its definition, is that of 1 - p.
    Loss("dft", DFT(), lambda ce: 1 - torch.exp(-ce)),
    Loss("poly1", Poly1(), lambda ce: ce + 1 - torch.exp(-ce)),
]


def weights() -> Tensor:
    return torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": weights()},
    "smoothed and weighted": {"label_smoothing": 0.2, "weight": weights()},
    "probabilities": {"soft": True},
    "weighted probabilities": {"soft": True, "weight": weights(), "label_smoothing": 0.1},
}


def problem(form: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=generator)
    options = dict(FORMS[form])
    target = torch.tensor([1, 4, -100])
    if options.pop("soft", False):
        target = torch.softmax(torch.randn(logits.shape, generator=generator).double(), 1)
    return logits, target, options


def formula(loss: Loss, target: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    weight = options.get("weight", torch.ones(CLASSES, dtype=torch.float64))
    smoothing = options.get("label_smoothing", 0.0)

    def value(logits: Tensor) -> Tensor:
        ce = torch.logsumexp(logits, 1, keepdim=True) - logits
        if target.is_floating_point():
            q, count = target, torch.tensor(float(ROWS))
        else:
            kept = target >= 0
            q = (torch.arange(CLASSES) == target.unsqueeze(1)).double()
            count = weight[target[kept]].sum()
        q = q * (1 - smoothing) + smoothing / CLASSES
        if not target.is_floating_point():
            q = q * kept.unsqueeze(1)
        total = (q * weight * loss.formula(ce)).sum()
        return total if options.get("reduction") == "sum" else total / count

    return value


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad": func.grad,
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": func.hessian,
    "forward over forward": lambda f: func.jacfwd(func.jacfwd(f)),
    "reverse over forward": lambda f: func.jacrev(func.jacfwd(f)),
    "reverse over reverse": lambda f: func.jacrev(func.jacrev(f)),
    "forward three times": lambda f: func.jacfwd(func.jacfwd(func.jacfwd(f))),
    "autograd": lambda f: lambda z: torch.autograd.grad(f(z := z.clone().requires_grad_()), z)[0],
    "autograd twice": lambda f: lambda z: torch.autograd.functional.hessian(f, z),
}


def test_every_built_in_loss_is_here() -> None:
    assert {loss.spec.partition(":")[0] for loss in LOSSES} == set(BUILT_IN)
    for loss in LOSSES:
        assert getattr(create_loss(loss.spec), "link", CE()) == loss.link


@pytest.mark.parametrize("way", DERIVATIVES)
@pytest.mark.parametrize("form", FORMS)
def test_every_derivative_is_that_of_the_formula(form: str, way: str) -> None:
    logits, target, options = problem(form)
    for loss in LOSSES:

        def ours(z: Tensor, link: Link = loss.link) -> Tensor:
            return link_cross_entropy(z, target, link, **options)

        derivative = DERIVATIVES[way]
        # The oracle's ignored row is far from 0, where a root has no derivative.
        expected = derivative(formula(loss, target, options))(logits)
        torch.testing.assert_close(derivative(ours)(logits), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_half_precision_has_forward_derivatives_of_second_order_too(loss: Loss) -> None:
    logits, target, options = problem("plain")
    half = logits.bfloat16()

    def ours(z: Tensor) -> Tensor:
        return link_cross_entropy(z, target, loss.link, **options)

    expected = func.hessian(ours)(half.double())
    found = func.jacfwd(func.jacfwd(ours))(half)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_samples_without_a_batch_dimension_is_the_unreduced_loss(form: str) -> None:
    logits, target, options = problem(form)
    if not target.is_floating_point():
        target = target.clamp(min=0)
    options["reduction"] = "none"
    for loss in LOSSES:

        def one(z: Tensor, y: Tensor, link: Link = loss.link) -> Tensor:
            return link_cross_entropy(z, y, link, **options)

        expected = link_cross_entropy(logits, target, loss.link, **options)
        torch.testing.assert_close(func.vmap(one)(logits, target), expected)
        each = func.vmap(func.grad(one))(logits, target)
        whole = func.jacrev(lambda z: link_cross_entropy(z, target, loss.link, **options).sum())  # noqa: B023
        torch.testing.assert_close(each, whole(logits))


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_fake_and_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(
    form: str, reduction: str, kind: str
) -> None:
    logits, target, options = problem(form)
    options["reduction"] = reduction
    mode = FakeTensorMode()

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to("meta") if kind == "meta" else mode.from_tensor(x)

    fakes = {name: stand_in(value) for name, value in options.items()}
    for loss in LOSSES:
        real = link_cross_entropy(logits, target, loss.link, **options)
        z = stand_in(logits).requires_grad_()
        with mode if kind == "fake" else nullcontext():
            found = link_cross_entropy(z, stand_in(target), loss.link, **fakes)
            found.sum().backward()
        assert (found.shape, found.dtype) == (real.shape, real.dtype)
        assert z.grad is not None
        assert (z.grad.shape, z.grad.dtype) == (logits.shape, logits.dtype)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_takes_fake_and_meta_tensors(
    dtype: torch.dtype, reduction: Any, kind: str
) -> None:
    mode = FakeTensorMode()
    tensors = [torch.zeros(6, 4, dtype=dtype), torch.zeros(9, 4, dtype=dtype)]
    target = torch.zeros(6, dtype=torch.long)
    token_weight = torch.ones(6)
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"token_weight": token_weight}):
        for link in (CE(), Rooted(5.0)):
            real = link_linear_cross_entropy(*tensors, target, link, reduction=reduction, **options)
            move: Callable[[Tensor], Tensor] = (
                mode.from_tensor if kind == "fake" else lambda x: x.to("meta")
            )
            moved = {k: move(v) if isinstance(v, Tensor) else v for k, v in options.items()}
            h, w = (move(x).requires_grad_() for x in tensors)
            found = link_linear_cross_entropy(
                h, w, move(target), link, reduction=reduction, **moved
            )
            found.sum().backward()
            assert (found.shape, found.dtype) == (real.shape, real.dtype)
            assert h.grad is not None
            assert w.grad is not None
            assert (h.grad.dtype, w.grad.shape) == (dtype, w.shape)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_deterministic_mode_change_nothing(form: str) -> None:
    logits, target, options = problem(form)
    for loss in LOSSES:
        z = logits.clone().requires_grad_()
        expected = link_cross_entropy(z, target, loss.link, **options)
        (gradient,) = torch.autograd.grad(expected, z)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = link_cross_entropy(z, target, loss.link, **options)
            again = torch.autograd.grad(found, z)[0]
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_program_computes_the_loss(form: str) -> None:
    logits, target, options = problem(form)
    losses = LOSSES[1:4] if form == "plain" else LOSSES[1:2]
    for loss in losses:

        class Module(torch.nn.Module):
            def forward(self, z: Tensor, y: Tensor, link: Link = loss.link) -> Tensor:
                return link_cross_entropy(z, y, link, **options)

        program = torch.export.export(Module(), (logits, target), strict=False)
        expected = link_cross_entropy(logits, target, loss.link, **options)
        torch.testing.assert_close(program.module()(logits, target), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_inductor_gives_value_and_gradient_of_the_formula(loss: Loss, form: str) -> None:
    logits, target, options = problem(form)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: link_cross_entropy(z, target, loss.link, **options))
    z = logits.clone().requires_grad_()
    value = compiled(z)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, func.grad(formula(loss, target, options))(logits))
    torch.testing.assert_close(value, link_cross_entropy(logits, target, loss.link, **options))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_mean_of_nothing_is_nan_and_its_derivatives_are_zero(loss: Loss) -> None:
    logits, _, _ = problem("plain")
    target = torch.full((ROWS,), -100)
    for options in ({}, {"weight": weights()}, {"label_smoothing": 0.1}):
        z = logits.clone().requires_grad_()
        value = link_cross_entropy(z, target, loss.link, **options)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, z, create_graph=True)
        assert value.isnan()
        assert not gradient.any()
        if gradient.requires_grad:
            (product,) = torch.autograd.grad((gradient * logits).sum(), z, allow_unused=True)
            assert product is None or not product.any()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_weights_of_another_precision_and_uint8_labels_are_taken_alike(loss: Loss) -> None:
    logits, _, _ = problem("plain")
    target = torch.tensor([1, 4, 2])
    expected = link_cross_entropy(logits, target, loss.link, weight=weights())
    found = link_cross_entropy(logits, target.to(torch.uint8), loss.link, weight=weights().float())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_sequence_of_no_tokens_has_a_loss(reduction: Any, shift: bool) -> None:
    loss = link_linear_cross_entropy(
        torch.zeros(2, 0, 4, requires_grad=True),
        torch.zeros(9, 4),
        torch.zeros(2, 0, dtype=torch.long),
        Rooted(2.0),
        shift=shift,
        reduction=reduction,
    )
    if reduction == "none":
        assert loss.shape == (2, 0)
    else:
        assert torch.equal(loss.isnan(), torch.tensor(reduction == "mean"))


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[1]], ids=str)
def test_a_wrong_tensor_is_what_torch_raises_and_what_python_does(loss: Loss) -> None:
    z, y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    for kind, arguments, weight in (
        (ValueError, (z, y[:2]), None),
        (TypeError, (z.long(), y), None),
        (TypeError, (z, y.int()), None),
        (ValueError, (z, y), torch.ones(4)),
        (ValueError, (z, torch.zeros(3, 4)), None),
    ):
        for error in (kind, RuntimeError):
            with pytest.raises(error, match="must"):
                link_cross_entropy(*arguments, loss.link, weight=weight)
