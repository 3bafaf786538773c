"""Packed products on a GPU against the dequantised matrix in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.packed.packing import pack_codes
from rlo_gptq.packed.product import Stored, packed_product
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def stored_matrix(
    bits: int, m: int, d: int, group_size: int, device: torch.device, *, zeros: bool
) -> tuple[Stored, Tensor]:
    """A random packed matrix, and what it stands for in float64 on the CPU."""
    codes = torch.randint(1 << bits, (m, d), dtype=torch.uint8)
    groups = 1 if group_size < 1 else -(-d // group_size)
    group = torch.zeros(d, dtype=torch.long) if group_size < 1 else torch.arange(d) // group_size
    scales = (torch.rand(m, groups) + 0.1).half()
    zero = (1 << bits) / 2 - 0.5
    offset = (torch.rand(m, groups) * 3).half() if zeros else None
    z = zero if offset is None else offset[:, group].double()
    dense = scales[:, group].double() * (codes.double() - z)
    stored = Stored(
        pack_codes(codes, bits).to(device),
        scales.to(device),
        None if offset is None else offset.to(device),
        bits,
        group_size,
        d,
        zero,
        False,
    )
    return stored, dense


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.double().cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17])
@pytest.mark.parametrize(("m", "d", "group_size"), [(257, 4096, 128), (33, 70, -1)])
def test_a_product_is_that_of_the_dequantised_matrix(device, bits, n, m, d, group_size):
    dtype = DTYPES[(bits + n) % 3]
    stored, dense = stored_matrix(bits, m, d, group_size, device, zeros=n % 2 == 0)
    x = torch.randn(n, d, device=device).to(dtype)
    bias = torch.randn(m, device=device).to(dtype)
    scale = torch.rand(d, device=device) + 0.5
    order = torch.randperm(d, device=device).int()
    y = packed_product(x, stored, input_scale=scale, order=order, bias=bias)
    exact = (x.double().cpu() * scale.double().cpu())[:, order.long().cpu()] @ dense.T
    assert y.dtype == dtype
    assert off(y, exact + bias.double().cpu()) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "settings",
    [
        LayerSettings(bits=2, incoherence="hadamard", rescale=True),
        LayerSettings(bits=3, method="gptq", incoherence="kronecker", incoherence_sides="both"),
        LayerSettings(bits=4, method="gptq", group_size=32, sym=False),
        LayerSettings(grid="trellis", method="gptq", incoherence="hadamard"),
    ],
    ids=["ldlqRG", "both sides", "groups", "trellis"],
)
@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_computes_what_its_dense_form_computes(device, settings, n, dtype):
    x = torch.randn(300, 96)
    layer = quantize_layer(torch.randn(64, 96), x.T @ x / 300, settings, seed=1)
    module = QuantLinear.from_layer(layer, settings, bias=torch.randn(64))
    dense, offset = module.dequantize().double(), module.bias.detach().double()
    module = module.to(device)
    x = torch.randn(n, 96, device=device).to(dtype)
    truth = x.double().cpu() @ dense.T + offset
    assert off(module(x), truth) < TOLERANCE[dtype] * 1.5


@pytest.mark.kernels
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_can_be_captured_in_a_graph(device, bits):
    settings = LayerSettings(bits=bits, method="nearest", incoherence="hadamard", rescale=True)
    layer = quantize_layer(torch.randn(256, 512), torch.eye(512), settings, seed=1)
    module = QuantLinear.from_layer(layer, settings).to(device)
    x = torch.randn(1, 512, device=device, dtype=torch.float16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(x), module(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, module(x))


@pytest.mark.kernels
def test_a_layer_runs_where_its_tensors_are(each_device):
    stored, dense = stored_matrix(4, 64, 128, 32, each_device, zeros=True)
    x = torch.randn(2, 128, device=each_device)
    y = packed_product(x, stored, input_scale=None, order=None, bias=None)
    assert off(y, x.double().cpu() @ dense.T) < 1e-5


@pytest.mark.kernels
def test_a_layer_compiles_whole(device):
    settings = LayerSettings(bits=2, method="nearest", incoherence="hadamard", rescale=True)
    layer = quantize_layer(torch.randn(256, 512), torch.eye(512), settings, seed=1)
    module = QuantLinear.from_layer(layer, settings).to(device)
    x = torch.randn(1, 512, device=device, dtype=torch.float16)
    with torch.no_grad():
        plain = module(x)
        found = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)
