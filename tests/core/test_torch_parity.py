"""Every input that torch tests its own cross entropy with, given to ours.

Cross entropy takes the shortest way to torch's; an identity link of our own takes the way of every
other loss. Both must be cross entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rlo_core import BinaryLinkLoss, CELoss, LinkLoss, link_binary_cross_entropy, link_cross_entropy
from rlo_core.links import CE, Link
from torch import Tensor

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", exc_type=ImportError, reason="needs expecttest"
)
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
# torch's test modules freeze the backend flags of the whole process, and trainers set them.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True


class Identity(Link):
    """Cross entropy that the library cannot know for cross entropy."""

    def value(self, ce: Tensor) -> Tensor:
        return ce * 1.0

    def slope(self, ce: Tensor) -> Tensor:
        return torch.ones_like(ce)


Case = tuple[dict[str, Any], Tensor, Tensor]


def module_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """The samples of torch.nn.CrossEntropyLoss, then those of the function."""
    torch.manual_seed(0)
    for sample in common_modules.module_inputs_torch_nn_CrossEntropyLoss(
        None, "cpu", dtype, requires_grad=True, training=True
    ):
        logits, target = sample.forward_input.args
        yield f"module-{sample.desc}", (sample.constructor_input.kwargs, logits, target)
    samples = invocations.sample_inputs_cross_entropy(None, "cpu", dtype, requires_grad=True)
    for number, sample in enumerate(samples):
        yield f"function-{number}", (sample.kwargs, sample.input, *sample.args)


FLOAT64 = dict(module_cases(torch.float64))
FLOAT32 = dict(module_cases(torch.float32))


def with_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of a sum that weighs the samples differently."""
    weights = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", FLOAT64)
def test_ce_is_torchs_to_the_bit_in_float64(name: str) -> None:
    options, logits, target = FLOAT64[name]
    expected = with_gradient(F.cross_entropy(logits, target, **options), logits)
    found = with_gradient(CELoss(**options)(logits, target), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FLOAT64)
def test_an_identity_link_is_cross_entropy_in_float64(name: str) -> None:
    options, logits, target = FLOAT64[name]
    expected = with_gradient(F.cross_entropy(logits, target, **options), logits)
    found = with_gradient(LinkLoss(Identity(), **options)(logits, target), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
@pytest.mark.parametrize("name", FLOAT32)
def test_cross_entropy_is_torchs_to_rounding_in_float32(name: str, link: Link) -> None:
    options, logits, target = FLOAT32[name]
    expected = with_gradient(F.cross_entropy(logits, target, **options), logits)
    found = with_gradient(link_cross_entropy(logits, target, link, **options), logits)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
@pytest.mark.parametrize("name", FLOAT32)
def test_half_precision_is_float32_with_the_gradient_cast_at_the_end(
    name: str, link: Link, dtype: torch.dtype
) -> None:
    options, logits, target = FLOAT32[name]
    logits = logits.detach().to(dtype).requires_grad_()
    exact = logits.detach().float().requires_grad_()
    value, gradient = with_gradient(F.cross_entropy(exact, target, **options), exact)
    found = with_gradient(link_cross_entropy(logits, target, link, **options), logits)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], value, rtol=2e-6, atol=2e-6, equal_nan=True)
    one_unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found[1].float(), gradient.to(dtype).float(), rtol=one_unit, atol=1e-6, equal_nan=True
    )


def error_cases() -> list[Any]:
    # Older versions of torch have no such list.
    name = "module_error_inputs_torch_nn_CrossEntropyLoss"
    cases = getattr(common_modules, name, lambda *_, **__: [])
    return list(cases(None, "cpu", torch.float32, requires_grad=False, training=True))


@pytest.mark.parametrize("sample", error_cases(), ids=lambda case: case.error_regex[:40])
def test_what_torch_refuses_we_refuse(sample: Any) -> None:
    module = sample.module_error_input
    for link in (CE(), Identity()):
        with pytest.raises((ValueError, TypeError, IndexError)):
            LinkLoss(link, **module.constructor_input.kwargs)(*module.forward_input.args)


def binary_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    samples = invocations.sample_inputs_binary_cross_entropy_with_logits(
        None, "cpu", torch.float64, requires_grad=True
    )
    return {str(n): (s.kwargs or {}, s.input, *s.args) for n, s in enumerate(samples)}


BINARY = binary_cases()


@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
@pytest.mark.parametrize("name", BINARY)
def test_binary_cross_entropy_is_torchs(name: str, link: Link) -> None:
    options, logits, target = BINARY[name]
    expected = with_gradient(F.binary_cross_entropy_with_logits(logits, target, **options), logits)
    found = with_gradient(link_binary_cross_entropy(logits, target, link, **options), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    criterion = BinaryLinkLoss(link, **options)
    torch.testing.assert_close(criterion(logits, target), expected[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
def test_an_empty_batch_gives_what_torch_gives(
    shape: tuple[int, ...], reduction: str, link: Link
) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    found = link_cross_entropy(logits, target, link, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
def test_an_all_ignored_batch_gives_what_torch_gives(
    reduction: str, link: Link, dtype: torch.dtype
) -> None:
    logits = torch.randn(4, 3, requires_grad=True, dtype=dtype)
    target = torch.full((4,), -100)
    expected = F.cross_entropy(logits.float(), target, reduction=reduction)
    found = link_cross_entropy(logits, target, link, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("link", [CE(), Identity()], ids=["ce", "identity"])
def test_nan_logits_give_nan_and_only_in_their_own_sample(link: Link) -> None:
    logits = torch.randn(3, 4)
    logits[1, 2] = torch.nan
    logits.requires_grad_()
    target = torch.tensor([0, 1, 2])
    loss = link_cross_entropy(logits, target, link, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(gradient).any(1).tolist() == [False, True, False]
    assert torch.isnan(link_cross_entropy(logits, target, link))
