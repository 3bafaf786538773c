"""Fused linear losses on a fake CUDA device: launches, waits, bytes alive at most."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from gpu_trace import Trace, fake_gpu
from rlo_core import CE, Rooted, link_linear_cross_entropy
from rlo_core.linear import fused, ops, plan_linear_loss, two_pass
from rlo_core.linear.plan import block_columns
from rlo_core.linear.settings import Settings

pytest.importorskip("triton")

TOKENS = 8192
HEADS = {"gemma-2-2b": (2304, 256_000), "llama-3-8b": (4096, 128_256)}
# 1.3 times what cut-cross-entropy holds: the gradients and a little.
MOST = {"gemma-2-2b": 1.6e9, "llama-3-8b": 1.5e9}


@functools.cache
def traced(
    head: str, smoothing: float = 0.0, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> Trace:
    """Both passes; hidden and weight are there before, as in a model."""
    from rlo_core.linear import triton_kernels

    width, classes = HEADS[head]
    with fake_gpu(triton_kernels) as trace, torch.no_grad():
        hidden = torch.empty(TOKENS, width, device="cuda", dtype=dtype)
        weight = torch.empty(classes, width, device="cuda", dtype=dtype)
        offset = torch.empty(classes, device="cuda", dtype=dtype) if bias else None
        target = torch.empty(TOKENS, device="cuda", dtype=torch.int64)
        trace.restart()
        settings = Settings(
            dtype,
            classes,
            columns=block_columns(TOKENS, weight, dtype, None),
            label_smoothing=smoothing,
            weight_dtype=dtype,
            hidden_grad=True,
            weight_grad=True,
            bias_grad=bias,
        )
        loss, kept = two_pass.forward(hidden, weight, offset, target, settings)
        grads = two_pass.backward(loss, hidden, weight, offset, target, kept, settings)
        assert grads.weight is not None
        assert grads.weight.dtype == dtype
    return trace


@pytest.mark.parametrize("head", list(HEADS))
def test_two_passes_hold_little_more_than_the_gradients(head):
    trace = traced(head)
    assert trace.peak <= MOST[head], trace.summary()


@pytest.mark.parametrize("head", list(HEADS))
def test_two_passes_never_wait_and_take_four_products(head):
    width, classes = HEADS[head]
    trace = traced(head)
    assert not trace.syncs, trace.summary()
    assert not trace.double, trace.summary()
    assert trace.flops == 4 * 2 * TOKENS * width * classes
    blocks = -(-classes // 8192)
    assert trace.launches <= 8 * blocks + 60, trace.summary()
    assert trace.launched["_statistics_kernel"] == blocks
    assert trace.launched["_gradient_kernel"] == blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_smoothing_and_a_bias_go_through_the_kernels_without_a_wait(dtype):
    trace = traced("llama-3-8b", 0.1, dtype, True)
    assert not trace.syncs, trace.summary()
    assert trace.launched["_gradient_kernel"] == 16


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_a_call_never_waits_and_stops_the_device_on_a_wrong_label(reduction, impl, monkeypatch):
    from rlo_core.linear import triton_kernels

    monkeypatch.setattr(fused, "_has_no_values", lambda hidden: False)
    with fake_gpu(triton_kernels) as trace:
        hidden = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(1000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(64, device="cuda", dtype=torch.int64)
        factor = torch.empty(64, device="cuda")
        link_linear_cross_entropy(
            hidden,
            weight,
            target,
            Rooted(3.0),
            reduction=reduction,
            impl=impl,
            token_weight=factor,
            softcap=30.0,
        )
    assert not trace.syncs, trace.summary()
    assert trace.launched["_assert_async"] == 1


def test_a_backward_pass_of_chunks_makes_no_second_float32_copy_of_the_weights_gradient():
    with fake_gpu() as trace, torch.no_grad():
        total = torch.empty(1 << 16, 64, device="cuda")
        trace.restart()
        ops._times_now(total, torch.empty((), device="cuda"), torch.bfloat16)
    assert trace.peak <= 1.3 * (1 << 16) * 64 * 2, trace.summary()


def test_kernels_are_launched_on_the_device_of_the_tile():
    from rlo_core.linear import triton_kernels

    with fake_gpu(triton_kernels, devices=2) as trace, torch.no_grad():
        hidden = torch.empty(8, 16, device="cuda:1", dtype=torch.bfloat16)
        weight = torch.empty(100, 16, device="cuda:1", dtype=torch.bfloat16)
        target = torch.empty(8, device="cuda:1", dtype=torch.int64)
        two_pass.forward(hidden, weight, None, target, Settings(torch.bfloat16, 100, columns=64))
    assert trace.devices == {"cuda:1"}
    assert set(trace.kernel_devices) == {1}


@pytest.mark.parametrize(
    ("trainable", "dtype", "impl"),
    [
        (True, torch.bfloat16, "two-pass"),
        (True, torch.float32, "two-pass"),
        (False, torch.bfloat16, "chunked"),
    ],
)
def test_auto_chooses_by_what_has_to_be_summed(
    trainable: bool, dtype: Any, impl: str, monkeypatch: pytest.MonkeyPatch
):
    """A frozen head needs two products by chunks, and three in two passes."""
    monkeypatch.setattr("rlo_core.linear.plan.cce_installed", lambda: False)
    with fake_gpu():
        hidden = torch.empty(TOKENS, 64, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.empty(32_000, 64, device="cuda", dtype=dtype, requires_grad=trainable)
        assert plan_linear_loss(hidden, weight, CE()).impl == impl
