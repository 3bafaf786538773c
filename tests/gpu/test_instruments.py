"""The instruments themselves, on code whose counts are known."""

from __future__ import annotations

import types

import gpu_aot
import pytest
import torch
import triton
import triton.language as tl
from gpu_trace import fake_gpu


def test_a_trace_counts_launches_bytes_flops_and_float64():
    with fake_gpu() as trace:
        a = torch.empty(64, 32, device="cuda")
        b = (a @ a.T).relu_()
        b.double()
    assert trace.launches == 3
    assert trace.launched == {"mm": 1, "relu_": 1, "_to_copy": 1}
    assert trace.flops == 2 * 64 * 64 * 32
    assert trace.bytes == 4 * (2 * 64 * 32 + 64 * 64) + 4 * 64 * 64 + 12 * 64 * 64
    assert [name for name, _ in trace.double] == ["_to_copy"]


def test_a_trace_knows_the_most_bytes_alive():
    with fake_gpu() as trace:
        a = torch.zeros(1000, device="cuda")
        for _ in range(5):
            a = a + 1
    assert trace.peak == 8000


@pytest.mark.parametrize("lightning_was_imported", [False, True])
def test_a_trace_sees_every_wait_for_the_device(lightning_was_imported, monkeypatch):
    if lightning_was_imported:
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with fake_gpu(scalar=0) as trace:
        a = torch.empty(8, device="cuda")
        assert not (a > 0).any()
        assert a.sum().item() == 0.0
        a.cpu()
        a.masked_select(a > 0)
        a.nonzero()
        torch.empty(8).to("cuda")
        a.to("cpu", non_blocking=True)
    assert sum(trace.syncs.values()) == 6, trace.summary()


def test_a_trace_follows_devices():
    with fake_gpu(devices=2) as trace:
        torch.empty(8, device="cuda:1") + 1
    assert trace.devices == {"cuda:1"}


@triton.jit
def _scaled_kernel(x, y, factor, n, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(y + at, (value * value if SQUARED else value) * factor, mask=at < n)


@pytest.mark.parametrize("target", list(gpu_aot.TARGETS))
@pytest.mark.parametrize("n", [4096, 4095])
def test_a_launch_is_compiled_as_it_would_be_on_the_device(target, n):
    module = types.ModuleType("kernels")
    module._scaled_kernel = _scaled_kernel
    x = torch.empty(n, device="meta")
    with gpu_aot.recorded(module) as launches:
        module._scaled_kernel[(4,)](x, x, 2.0, n, SQUARED=True, BLOCK=1024, num_warps=4)
    assert module._scaled_kernel is _scaled_kernel
    (launch,) = launches
    assert launch.options == {"num_warps": 4}
    found = gpu_aot.measured(gpu_aot.build(launch, target), target)
    assert found.spilled == found.float64 == found.tensor_cores == 0
    assert 0 < found.registers <= 64
    assert found.instructions > 10
    # A width that is no multiple of 4 floats has no wide load: the mask could cut one.
    assert (found.wide_loads > 0) == (n % 16 == 0)
