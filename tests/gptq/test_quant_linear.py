"""A packed layer computes what its dequantised weight computes."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.packed import tiles
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings

CASES = [
    LayerSettings(bits=2, method="gptq", incoherence="hadamard"),
    LayerSettings(bits=3, method="gptq", incoherence="kronecker", incoherence_sides="both"),
    LayerSettings(bits=4, method="nearest", group_size=16, sym=False),
    LayerSettings(bits=8, method="nearest", group_size=0),
    LayerSettings(bits=4, method="nearest", integer_zero=True, rescale=True),
]


def layer_of(settings: LayerSettings, rows: int = 20, columns: int = 44, *, bias: bool = True):
    torch.manual_seed(3)
    weight, x = torch.randn(rows, columns), torch.randn(200, columns)
    layer = quantize_layer(weight, x.T @ x / 200, settings, seed=11)
    return layer, QuantLinear.from_layer(layer, settings, bias=torch.randn(rows) if bias else None)


@pytest.mark.parametrize("settings", CASES)
def test_a_packed_layer_has_the_dequantised_weight_of_the_layer_it_was_made_of(settings):
    layer, module = layer_of(settings)
    torch.testing.assert_close(module.dequantize(), layer.dequantize(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("tile", [1 << 20, 100])
def test_forward_and_gradient_equal_those_of_the_dense_layer(settings, tile, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile)
    _, module = layer_of(settings)
    dense = module.to_linear()
    x = torch.randn(2, 5, 44, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = module(x), dense(y)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)


def test_no_tensor_of_a_layer_is_dense():
    _, module = layer_of(CASES[0], 256, 256, bias=False)
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert size < 1.2 * 256 * 256 * 2 / 8


def test_half_precision_leaves_the_grid_as_it_is():
    _, module = layer_of(LayerSettings(bits=4, method="nearest", scale_dtype="float32"))
    before = module.scales.clone()
    module.half()
    assert module.bias.dtype == torch.float16
    assert module.scales.dtype == torch.float32
    assert torch.equal(module.scales, before)


def test_loading_another_seed_changes_the_transform():
    _, module = layer_of(CASES[0])
    x = torch.randn(3, 44)
    before = module(x)
    state = module.state_dict()
    module.load_state_dict({**state, "seed": state["seed"] + 1})
    assert not torch.allclose(module(x), before)


def test_bfloat16_inputs_give_bfloat16_outputs_near_the_float32_ones():
    _, module = layer_of(CASES[1])
    x = torch.randn(4, 44)
    low = module(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("settings", [CASES[0], CASES[4]])
def test_a_packed_layer_compiles_into_one_graph_with_the_gradient_of_its_inputs(settings):
    """After one plain call, which makes the rotation from its seed."""
    _, module = layer_of(settings)
    x = torch.randn(3, 44, requires_grad=True)
    expected = module(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope)
