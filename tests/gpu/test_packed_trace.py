"""Packed layers on a fake CUDA device: few launches, no waits, the right device."""

from __future__ import annotations

import pytest
import torch
from gpu_trace import Trace, fake_gpu
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding import trellis
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.rounding.trellis import Trellis
from rlo_gptq.settings import LayerSettings

pytest.importorskip("triton")

PLAIN = LayerSettings(bits=2, method="gptq", group_size=128)
ROTATED = LayerSettings(bits=2, incoherence="hadamard", rescale=True)
TRELLIS = LayerSettings(grid="trellis", incoherence="hadamard")
WIDE = LayerSettings(grid="trellis:L=12", incoherence="hadamard")
THREE = LayerSettings(bits=3, method="gptq", group_size=128, sym=False, rescale=True)


def traced(
    settings: LayerSettings, rows: int, device: str = "cuda:0", *, bias: bool = False
) -> Trace:
    """The second call of a layer; the first makes its rotation and its tables."""
    from rlo_gptq.packed import matmul_kernel, product

    # What is kept from call to call must be no fake tensor on the CPU, and none from another trace.
    for kind in (Trellis(2, 10), Trellis(2, 12)):
        kind.rows_of_states(4096), kind.values(torch.device("cpu"))
    kept = (product._trellis_tables, trellis._codebook_there)
    for table in kept:
        table.cache_clear()
    with fake_gpu(matmul_kernel, scalar=0, devices=2) as trace, torch.no_grad():
        layer = QuantLinear(4096, 4096, settings, bias=bias, dtype=torch.bfloat16, device=device)
        if settings.incoherence != "none":
            layer._transform = Transform("hadamard", "in", 0, 4096, 4096)
        x = torch.empty(rows, 4096, device=device, dtype=torch.bfloat16)
        layer(x)
        trace.restart()
        layer(x)
    for table in kept:
        table.cache_clear()
    return trace


@pytest.mark.parametrize(
    ("settings", "launches"), [(PLAIN, 2), (ROTATED, 6), (TRELLIS, 6), (THREE, 2)]
)
def test_one_row_takes_few_launches_and_never_waits(settings, launches):
    """Nothing waits or allocates outside torch's pool: such a call can be captured in a graph."""
    trace = traced(settings, 1, bias=True)
    assert not trace.syncs, trace.summary()
    assert trace.launches <= launches, trace.summary()
    assert not trace.double


@pytest.mark.parametrize("settings", [PLAIN, ROTATED, TRELLIS, WIDE, THREE])
def test_many_rows_unpack_a_layer_in_few_tiles(settings):
    trace = traced(settings, 17)
    assert not trace.syncs, trace.summary()
    assert trace.launches <= 40, trace.summary()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_kernels_are_launched_where_the_layer_is(device):
    trace = traced(PLAIN, 4, device)
    assert trace.devices <= {device}
    assert set(trace.kernel_devices) == {torch.device(device).index}


def test_layers_on_two_devices_reach_their_own():
    """As `device_map` spreads a model: hidden states move, layers launch where they are."""
    from rlo_gptq.packed import matmul_kernel

    with fake_gpu(matmul_kernel, scalar=0, devices=2) as trace, torch.no_grad():
        first = QuantLinear(256, 256, PLAIN, device="cuda:0")
        second = QuantLinear(256, 256, PLAIN, device="cuda:1")
        x = torch.empty(1, 256, device="cuda:0", dtype=torch.float16)
        y = second(first(x).to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert trace.kernel_devices == {0: 2, 1: 2}
