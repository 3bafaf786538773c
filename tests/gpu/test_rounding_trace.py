"""`quantize_layer` on a fake CUDA device: launches, waits for the device, bytes and flops."""

from __future__ import annotations

import functools

import pytest
import torch
from gpu_trace import Trace, fake_gpu
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings

pytest.importorskip("triton")

GPTQ = LayerSettings(bits=4, method="gptq", group_size=128)
LDLQ_RG = LayerSettings(bits=2, incoherence="hadamard", rescale=True)
GROUPS = LayerSettings(bits=3, group_size=128, incoherence="hadamard", rescale=True)


def _answer(tensor: torch.Tensor, line: str) -> float:
    """Inputs are right and the factor succeeds; a greedy pass moves much."""
    return (
        1_000_000 if "methods.py" in line and "changed" in line else 1 if "isfinite" in line else 0
    )


@functools.cache
def traced(m: int, d: int, settings: LayerSettings) -> Trace:
    from rlo_gptq.rounding import triton_kernels

    with fake_gpu(triton_kernels, scalar=_answer) as trace, torch.no_grad():
        weight = torch.empty(m, d, device="cuda", dtype=torch.float16)
        quantize_layer(weight, torch.empty(d, d, device="cuda"), settings, seed=0)
    return trace


@pytest.mark.parametrize("settings", [GPTQ, LDLQ_RG, GROUPS], ids=["gptq", "ldlqRG", "groups"])
def test_a_layer_takes_few_launches_and_waits_rarely(settings):
    trace = traced(4096, 4096, settings)
    assert trace.launches <= 2000, trace.summary()
    assert sum(trace.syncs.values()) <= 8, trace.summary()
    assert trace.bytes <= 250e9, trace.summary()
    assert trace.flops <= 10e12, trace.summary()
    assert trace.launched["_feedback_kernel"] == 2 * 4096 // 128
    passes = settings.passes
    assert trace.launched["_greedy_kernel"] == passes * 4096 // 128


@pytest.mark.parametrize("settings", [GPTQ, LDLQ_RG], ids=["gptq", "ldlqRG"])
def test_a_plan_counts_what_a_layer_takes(settings):
    from rlo_gptq.pipeline.capacity import rounding_cost

    trace, cost = traced(4096, 4096, settings), rounding_cost(4096, 4096, settings)
    assert cost.flops == pytest.approx(trace.flops, rel=0.25)
    assert cost.bytes == pytest.approx(trace.bytes, rel=0.25)


def test_float64_is_left_to_what_is_summed():
    """Matrices of the rotation are made in float64 on the CPU; nothing else is."""
    lines = [line for _, line in traced(4096, 4096, LDLQ_RG).double]
    assert all("rotation.py" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("settings", [GPTQ, GROUPS], ids=["gptq", "groups"])
def test_launches_grow_no_faster_than_columns_and_not_with_rows(settings):
    small, wide = traced(4096, 4096, settings), traced(4096, 8192, settings)
    assert wide.launches <= 2.05 * small.launches
    assert traced(8192, 4096, settings).launches <= 1.1 * small.launches
    assert sum(wide.syncs.values()) <= 8


@pytest.mark.slow
def test_the_widest_layer_of_a_7b_model_stays_within_its_bytes():
    trace = traced(4096, 11008, GPTQ)
    assert trace.bytes <= 900e9, trace.summary()
    assert trace.flops <= 40e12, trace.summary()


def test_kernels_are_launched_on_the_device_of_their_tensors():
    from rlo_gptq.rounding import triton_kernels

    with fake_gpu(triton_kernels, scalar=_answer, devices=2) as trace, torch.no_grad():
        weight = torch.empty(64, 256, device="cuda:1")
        quantize_layer(weight, torch.empty(256, 256, device="cuda:1"), LDLQ_RG, seed=0)
    assert trace.devices == {"cuda:1"}
    assert set(trace.kernel_devices) == {1}
