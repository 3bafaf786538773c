"""`compat="quip"` against the authors' algorithm written out column by column, faults included."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.rounding.quip import prepare, quip_round
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.settings import LayerSettings
from torch import Tensor


def reference(W: Tensor, H: Tensor, bits: int, method: str, passes: int, grid: str) -> Tensor:
    """Clip, sort, feed back from the last column, run greedy passes that leave the grid, clamp."""
    top = 2**bits - 1
    if grid == "b":
        scale = 2.4 * W.square().mean().sqrt()
        x = ((W / scale + 1) / 2 * top).clamp(0, top)
    else:
        low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
        scale = ((high - low) / top)[:, None]
        x = (W / scale + (-low[:, None] / scale).round()).clamp(0, top)
    d = x.shape[1]
    order = torch.arange(d).flip(0).tolist()
    if method != "ldlq":
        order = torch.argsort(H.diagonal(), descending=True, stable=True).tolist()
    codes = x.clone()
    if method != "allbal":
        U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
        target = x[:, order].clone()
        for i, j in enumerate(order):
            codes[:, j] = (target[:, i] + 0.5).floor().clamp(0, top)
            target[:, i:] -= ((target[:, i] - codes[:, j]) / U[i, i])[:, None] * U[i, i:]
    error = codes - x
    for _ in range(passes):
        for j in order:
            step = codes[:, j] - (codes[:, j] - error @ H[:, j] / H[j, j]).round()
            codes[:, j] -= step
            error[:, j] -= step
        codes = codes.clamp(0, top)
    return codes


@pytest.mark.parametrize("grid", ["a", "b"])
@pytest.mark.parametrize(
    ("method", "passes"), [("ldlq", 0), ("ldlq", 2), ("ldlqRG", 3), ("allbal", 2)]
)
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_the_authors(layer, bits, method, passes, grid):
    W, H = layer(32, 80, 0)
    W, H = W.double(), H.double()
    options = LayerSettings(
        bits=bits,
        method=method,
        npasses=passes,
        compat="quip",
        scale_dtype="float32",
        rescale=True,
        incoherence="kronecker",
        incoherence_sides="both",
        sym=grid == "b",
        integer_zero=grid == "a",
    )
    ready = prepare(W, H, Transform("kronecker", "both", 0, 80, 32), options)
    found = quip_round(ready.weight.T.contiguous(), ready.hessian, options, seed=0)
    expected = reference(ready.weight, ready.hessian, bits, method, passes, grid)
    # A tie within float32's rounding of the scale may fall either way.
    assert (expected != found.codes.T).double().mean() < 0.01


def test_the_lazy_form_runs_no_greedy_pass_as_upstreams_swapped_arguments_do(layer):
    W, H = layer(16, 40, 1)
    codes = [
        quantize_layer(
            W, H, LayerSettings(compat="quip", npasses=passes, lazy_batch=lazy), seed=0
        ).codes
        for passes, lazy in ((10, True), (0, False), (10, False))
    ]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_what_upstream_cannot_run_is_refused(layer):
    W, H = layer(8, 16, 1)
    with pytest.raises(
        ValueError, match=r"^npasses must be positive with lazy_batch and compat 'quip', got 0$"
    ):
        quantize_layer(W, H, LayerSettings(compat="quip", lazy_batch=True), seed=0)
    with pytest.raises(
        ValueError, match=r"^npasses must be positive for 'allbal' with compat 'quip', got 0$"
    ):
        quantize_layer(W, H, LayerSettings(compat="quip", method="allbal"), seed=0)


@pytest.mark.parametrize("method", ["nearest", "gptq", "ldlbal_admm"])
@pytest.mark.parametrize("grid", ["a", "b"])
def test_the_other_methods_give_codes_in_the_grid_that_read_back(layer, method, grid):
    W, H = layer(16, 40, 1)
    options = LayerSettings(
        bits=4, method=method, compat="quip", npasses=2, sym=grid == "b", integer_zero=grid == "a"
    )
    rounded = quantize_layer(W, H, options, seed=0)
    assert int(rounded.codes.max()) <= 15
    assert rounded.proxy < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "passes", "incoherent", "published"),
    [
        ("nearest", 0, False, (0.580, 0.162, 0.0364)),
        ("gptq", 0, False, (0.269, 0.0682, 0.0153)),
        ("ldlqRG", 10, False, (0.170, 0.0423, 0.0094)),
        ("nearest", 0, True, (0.0529, 0.0112, 0.0040)),
        ("gptq", 0, True, (0.0188, 0.0033, 0.0009)),
        ("ldlqRG", 10, True, (0.0167, 0.0047, 0.0026)),
    ],
)
def test_losses_are_those_measured_with_the_authors_program(
    layer, method, passes, incoherent, published
):
    """Same generator in words, other random numbers: the layers differ by tens of percent."""
    turned = {"rescale": True, "incoherence": "kronecker", "incoherence_sides": "both"}
    for bits, expected in zip((2, 3, 4), published, strict=True):
        options = LayerSettings(
            bits=bits, method=method, npasses=passes, compat="quip", sym=incoherent,
            integer_zero=not incoherent, **(turned if incoherent else {}),
        )  # fmt: skip
        loss = sum(quantize_layer(*layer(512, 1024, s), options, seed=s).proxy for s in (0, 1)) / 2
        assert 0.5 * expected < loss < 2.0 * expected
