"""Rounding a layer on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.rounding import feedback, greedy
from rlo_gptq.rounding.grids import fit_grid
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings
from torch import Tensor

SETTINGS = {
    "gptq": LayerSettings(bits=4, method="gptq", group_size=128),
    "gptq act-order": LayerSettings(bits=3, method="gptq", act_order=True),
    "ldlqRG": LayerSettings(bits=2, incoherence="hadamard", rescale=True),
    "groups": LayerSettings(bits=3, group_size=32, incoherence="hadamard", rescale=True),
    "kronecker": LayerSettings(bits=2, method="ldlq", incoherence="kronecker"),
    "trellis": LayerSettings(grid="trellis", method="gptq", incoherence="hadamard"),
}


def problem(m: int, d: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(2 * d, d) @ torch.diag(torch.rand(d) * 3 + 0.1)
    return torch.randn(m, d), x.T @ x / (2 * d) + 0.01 * torch.eye(d)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize(("m", "d"), [(96, 256), (65, 130)])
def test_a_layer_is_rounded_as_well_as_on_the_cpu(device, name, m, d):
    """Not the same codes: sums are taken in another order."""
    weight, hessian = problem(m, d)
    here = quantize_layer(weight, hessian, SETTINGS[name], seed=0)
    there = quantize_layer(weight.to(device), hessian.to(device), SETTINGS[name], seed=0)
    assert float(there.proxy) == pytest.approx(float(here.proxy), rel=0.05)
    error = (weight - there.dequantize().cpu()).double()
    exact = ((error @ hessian.double()) * error).sum()
    norm = ((weight.double() @ hessian.double()) * weight.double()).sum()
    assert float(there.proxy) == pytest.approx(float(exact / norm), rel=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("bits", "d", "m", "group_size", "block"),
    [(2, 64, 40, -1, 16), (3, 100, 33, 8, 128), (4, 128, 257, 32, 128), (8, 65, 5, -1, 64)],
)
def test_kernels_give_the_codes_of_torchs_operations(
    device, bits, d, m, group_size, block, monkeypatch
):
    weight, hessian = problem(m, d)
    weight, hessian = weight.T.contiguous().to(device), hessian.to(device)
    settings = LayerSettings(bits=bits, group_size=group_size)
    grid = fit_grid(weight, torch.ones(d, device=device), settings)
    order = torch.arange(d, device=device)
    factor = feedback.factor(hessian).feedback
    results = []
    for kernels in (False, True):
        for module in (feedback, greedy):
            monkeypatch.setattr(module, "kernels_apply", lambda *a, on=kernels: on)
        codes = feedback.round_with_feedback(weight, factor, grid, order, block_size=block)[0]
        state = greedy.start(weight, hessian, codes.clone(), grid, order)
        greedy.greedy_pass(state, grid, block_size=block)
        results.append((codes, state.loss().sum()))
    assert (results[0][0] != results[1][0]).float().mean() < 0.02
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.02, atol=1e-3)
