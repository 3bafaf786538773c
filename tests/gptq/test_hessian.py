"""Sums of outer products in float32 that are as good as in float64."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.calibration.hessian_sum import SUM_ROWS, CalibrationError, HessianSum


def relative_error(sums: torch.Tensor, exact: torch.Tensor) -> float:
    return float((sums.double() - exact).abs().max() / exact.abs().max())


def test_many_small_additions_lose_nothing_that_a_plain_float32_sum_loses():
    torch.manual_seed(0)
    hessian, plain = HessianSum(6), torch.zeros(6, 6)
    exact = torch.zeros(6, 6, dtype=torch.float64)
    chunks = [torch.rand(4, 6) + 0.5 for _ in range(20_000)]
    for x in chunks:
        hessian.add(x)
        plain += x.T @ x
        exact += (x.T @ x).double()  # the products themselves are float32 in all three
    exact /= 80_000
    assert relative_error(hessian.mean("layer"), exact) < 1e-7
    assert relative_error(plain / 80_000, exact) > 1e-6


def test_token_weights_are_those_of_a_weighted_mean():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 7, 5), torch.rand(2, 7)
    hessian = HessianSum(5)
    hessian.add(x, weights)
    flat = x.reshape(-1, 5).double()
    expected = (flat * weights.reshape(-1, 1)).T @ flat / weights.double().sum()
    torch.testing.assert_close(hessian.mean("layer").double(), expected, atol=1e-6, rtol=1e-5)


def test_a_wide_hessian_is_summed_in_strips_and_exactly_symmetric():
    x = torch.randn(30, SUM_ROWS + 9)
    hessian = HessianSum(SUM_ROWS + 9)
    hessian.add(x)
    mean = hessian.mean("layer")
    assert torch.equal(mean, mean.T)
    torch.testing.assert_close(mean, x.T @ x / 30, atol=1e-4, rtol=1e-4)


def test_a_layer_that_saw_no_token_gets_the_identity():
    assert torch.equal(HessianSum(4).mean("layer"), torch.eye(4))


def test_activations_that_are_not_finite_are_refused_with_the_layers_name():
    hessian = HessianSum(3)
    hessian.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(CalibrationError, match=r"inputs of layer 'h.0.fc' must be finite, got NaN"):
        hessian.mean("h.0.fc")
