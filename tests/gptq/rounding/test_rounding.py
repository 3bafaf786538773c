"""Rounding against independent oracles: GPTQ as published, brute force, and the loss itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlo_gptq.rounding.feedback import factor, round_with_feedback
from rlo_gptq.rounding.greedy import greedy_pass, refit_scales, start
from rlo_gptq.rounding.grids import ScalarGrid, column_groups, fit_grid
from rlo_gptq.rounding.layer import proxy_loss, quantize_layer
from rlo_gptq.settings import METHODS, LayerSettings
from torch import Tensor


def gptq_reference(
    W: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, bits: int, order: list[int]
) -> Tensor:
    """GPTQ from the paper, one column at a time, through the Cholesky factor of the inverse."""
    W, H = W.double().clone(), H.double()
    permuted = H[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)
    codes = torch.zeros_like(W)
    for i, j in enumerate(order):
        w = W[:, j]
        code = (w / scales[:, j] + zeros[:, j]).round().clamp(0, 2**bits - 1)
        codes[:, j] = code
        error = (w - scales[:, j] * (code - zeros[:, j])) / U[i, i]
        rest = order[i:]
        W[:, rest] -= error[:, None] * U[i, i:]
    return codes


def psd(d: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    return x.T @ x / d + 0.01 * torch.eye(d, dtype=torch.float64)


def plain_grid(x: Tensor, bits: int, group_size: int = -1) -> ScalarGrid:
    return fit_grid(
        x, torch.ones(len(x), dtype=x.dtype), LayerSettings(bits=bits, group_size=group_size)
    )


@pytest.mark.parametrize("group_size", [-1, 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_feedback_gives_gptqs_codes_on_the_same_grid_and_order(bits, reverse, group_size):
    g = torch.Generator().manual_seed(bits)
    d, m = 70, 12
    W = torch.randn(m, d, generator=g, dtype=torch.float64)
    H = psd(d, g)
    grid = plain_grid(W.T.contiguous(), bits, group_size)
    order = torch.arange(d).flip(0) if reverse else torch.arange(d)
    codes, _ = round_with_feedback(
        W.T[order].contiguous(), factor(H[order][:, order]).feedback, grid, order, block_size=32
    )
    group = grid.group
    expected = gptq_reference(
        W, H, grid.scales.T[:, group], grid.zeros.T[:, group], bits, order.tolist()
    )
    assert torch.equal(codes[torch.argsort(order)].T, expected)


def test_the_first_codes_of_ldlq_are_gptqs_in_reverse_order(layer):
    W, H = layer(16, 48, 0)
    plain = LayerSettings(bits=3, method="ldlq", refit=False, scale_dtype="float32")
    rounded = quantize_layer(W, H, plain, seed=0)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(48)
    expected = gptq_reference(
        W, damped, rounded.scales.expand(16, 48).double(), rounded.zeros.expand(16, 48).double(), 3,
        list(range(47, -1, -1)),
    )  # fmt: skip
    assert (rounded.codes.double() != expected).float().mean() < 0.003  # float32 against float64


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_the_block_size_does_not_change_the_codes(block_size):
    g = torch.Generator().manual_seed(0)
    W, H = torch.randn(50, 9, generator=g, dtype=torch.float64), psd(50, g)
    grid, order = plain_grid(W, 2), torch.arange(50)
    feedback = factor(H).feedback
    codes, _ = round_with_feedback(W, feedback, grid, order, block_size=block_size)
    expected, _ = round_with_feedback(W, feedback, grid, order, block_size=50)
    assert torch.equal(codes, expected)
    states = [start(W, H, codes.clone(), grid, order) for _ in range(2)]
    for state, size in zip(states, (block_size, 50), strict=True):
        greedy_pass(state, grid, block_size=size)
    assert torch.equal(states[0].codes, states[1].codes)


def test_a_greedy_pass_is_the_column_by_column_formula():
    g = torch.Generator().manual_seed(3)
    d, m = 40, 6
    W, H = torch.randn(d, m, generator=g, dtype=torch.float64), psd(d, g)
    grid, order = plain_grid(W, 2), torch.randperm(d, generator=g)
    codes = grid.round_all(W)
    expected = codes.clone()
    scale, zero = grid.scales[0], grid.zeros[0]
    for j in order.tolist():
        error = scale * (expected - zero) - W
        slope = H[j] @ error
        expected[j] = (expected[j] - slope / (H[j, j] * scale)).round().clamp(0, 3)
    state = start(W[order], H[order][:, order], codes[order], grid, order)
    changed = greedy_pass(state, grid, block_size=16)
    assert torch.equal(state.codes, expected[order])
    assert changed == (expected != codes).sum()
    kept = state.gradient.clone()
    state.refresh()
    torch.testing.assert_close(kept, state.gradient)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 24),
    m=st.integers(1, 5),
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([-1, 0, 5]),
    rank=st.integers(1, 30),
    sym=st.booleans(),
)
def test_no_greedy_pass_and_no_refit_ever_raises_the_loss(seed, d, m, bits, group_size, rank, sym):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, d, generator=g, dtype=torch.float64)
    H = x.T @ x
    W = torch.randn(d, m, generator=g, dtype=torch.float64)
    options = LayerSettings(bits=bits, group_size=group_size, sym=sym, scale_dtype="float16")
    grid = fit_grid(W, H.diagonal(), options)
    order = torch.randperm(d, generator=g)
    state = start(W[order], H[order][:, order], grid.round_all(W)[order], grid, order)
    tolerance = 1e-9 * (1 + state.loss().sum())
    for _ in range(3):
        before = state.loss()
        greedy_pass(state, grid, block_size=8)
        after = state.loss()
        assert (after <= before + tolerance).all()
        refit_scales(state, grid, group_size=group_size, scale_dtype="float16")
        assert state.loss().sum() <= after.sum() + tolerance
    assert ((state.codes >= 0) & (state.codes <= 2**bits - 1)).all()
    torch.testing.assert_close(state.values, grid.values(state.codes, order))


def test_brute_force_bounds_the_loss_and_ldlqrg_comes_near_it():
    """All 4^6 roundings of a row, on the grid that the method chose."""
    ratios = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        W, H = torch.randn(4, 6, generator=g), psd(6, g).float()
        options = LayerSettings(bits=2, percdamp=0.0, scale_dtype="float32")
        rounded = quantize_layer(W, H, options, seed=0)
        choices = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float32)
        values = rounded.scales[:, :, None] * (choices - rounded.zeros[:, :, None])
        error = values - W[:, None]
        best = ((error @ H) * error).sum(-1).amin(1)
        found = W - rounded.dequantize()
        loss = ((found @ H) * found).sum(-1)
        assert (loss >= best * (1 - 1e-4)).all()
        ratios.append(float(loss.sum() / best.sum()))
    assert sum(ratios) / len(ratios) < 1.25


def test_a_refit_lands_on_the_least_squares_scale():
    g = torch.Generator().manual_seed(1)
    W, H = torch.randn(20, 5, generator=g, dtype=torch.float64), psd(20, g)
    grid, order = plain_grid(W, 3), torch.arange(20)
    state = start(W, H, grid.round_all(W), grid, order)
    refit_scales(state, grid, group_size=-1, scale_dtype="float32")
    unit = state.codes - grid.zeros[0]
    root = torch.linalg.cholesky(H).T
    for row in range(5):
        fitted = torch.linalg.lstsq(root @ unit[:, row : row + 1], root @ W[:, row]).solution
        torch.testing.assert_close(grid.scales[0, row], fitted[0], rtol=1e-6, atol=0)
    kept = state.gradient.clone()
    state.refresh()
    torch.testing.assert_close(kept, state.gradient)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_fitted_scale_is_finer_than_the_widths_that_are_tried(bits):
    """Least squares after the search: the scale of its own codes, below any width of the search."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(64, 200, generator=g, dtype=torch.float64)
    h = torch.rand(64, generator=g, dtype=torch.float64) + 0.1
    grid = fit_grid(x, h, LayerSettings(bits=bits, sym=True, scale_dtype="float32"))
    top = 2**bits - 1
    zero = grid.zeros[0]

    def error(scale):
        codes = (x / scale + zero).round().clamp(0, top)
        return (h[:, None] * (x - scale * (codes - zero)) ** 2).sum(0)

    narrow = 0.7 * x.square().mean(0).sqrt()
    wide = x.abs().amax(0)
    tried = [error(2 / top * narrow * (wide / narrow) ** (i / 23)) for i in range(24)]
    best = torch.stack(tried).amin(0)
    found = error(grid.scales[0])
    assert (found <= best * (1 + 1e-6)).all()
    assert (found < best * (1 - 1e-6)).double().mean() > 0.9
    # And it is (nearly always, after two steps) where another step of least squares stays.
    unit = (x / grid.scales[0] + zero).round().clamp(0, top) - zero
    again = (h[:, None] * unit * x).sum(0) / (h[:, None] * unit.square()).sum(0)
    assert ((again / grid.scales[0] - 1).abs() < 0.01).double().mean() > 0.9


def test_a_slightly_indefinite_hessian_is_damped_by_one_percent_and_another_is_refused():
    """Sums of many float32 products can end a little below zero."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    values = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    values[0] = -0.002
    H = basis @ values.diag() @ basis.T
    found = factor(H.float())
    upper = torch.eye(12, dtype=torch.float64) + found.feedback.T.double()
    rebuilt = upper @ found.diagonal.double().diag() @ upper.T
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rebuilt, damped, rtol=0, atol=1e-3 * float(values.mean()))
    assert (found.diagonal > 0).all()
    values[0] = -0.1
    with pytest.raises(ValueError, match="must be positive semi-definite, got an indefinite one"):
        factor((basis @ values.diag() @ basis.T).float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_of_the_method_pays(layer, bits):
    """nearest > gptq > ldlqRG, all with incoherence, and the authors' form is worse than ours."""
    W, H = layer(48, 128, 0)
    turned = {"incoherence": "hadamard", "rescale": True}
    loss = {
        method: quantize_layer(
            W, H, LayerSettings(bits=bits, method=method, **turned), seed=0
        ).proxy
        for method in METHODS
    }
    assert loss["ldlqRG"] < loss["gptq"] < loss["nearest"]
    assert loss["ldlqRG"] < loss["allbal"]
    quip = LayerSettings(
        bits=bits, npasses=10, compat="quip", incoherence="kronecker", incoherence_sides="both",
        rescale=True,
    )  # fmt: skip
    authors = quantize_layer(W, H, quip, seed=0).proxy
    assert loss["ldlqRG"] < {2: 0.70, 3: 0.65, 4: 0.35}[bits] * authors


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_the_true_one_in_the_original_basis(layer, method):
    W, H = layer(24, 60, 1)
    options = LayerSettings(
        bits=3, method=method, incoherence="kronecker", incoherence_sides="both", rescale=True
    )
    rounded = quantize_layer(W, H, options, seed=4)
    error = (W - rounded.dequantize()).double()
    H = H.double()
    expected = (error @ H @ error.T).trace() / (W.double() @ H @ W.double().T).trace()
    assert rounded.proxy == pytest.approx(float(expected), rel=1e-4)
    x = torch.randn(7, 60)
    turned = rounded.transform.apply_input(x * rounded.input_scale)
    output = rounded.transform.apply_output_T(turned @ rounded.values().T)
    torch.testing.assert_close(output, x @ rounded.dequantize().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group_size", [-1, 0, 16, 13, 100])
@pytest.mark.parametrize(
    ("sym", "integer_zero"), [(True, False), (True, True), (False, True), (False, False)]
)
def test_every_grid_keeps_its_promises(layer, group_size, sym, integer_zero):
    W, H = layer(20, 50, 2)
    options = LayerSettings(bits=3, group_size=group_size, sym=sym, integer_zero=integer_zero)
    rounded = quantize_layer(W + 0.01, H, options, seed=0)
    groups = int(column_groups(50, group_size)[-1]) + 1
    assert rounded.scales.shape == rounded.zeros.shape == (20, groups)
    assert rounded.codes.dtype == torch.uint8
    assert int(rounded.codes.max()) <= 7
    assert torch.equal(rounded.scales, rounded.scales.half().float())
    if group_size == 0:
        assert rounded.scales.unique().numel() == rounded.zeros.unique().numel() == 1
    if sym:
        assert (rounded.zeros == (4.0 if integer_zero else 3.5)).all()
    if integer_zero:
        assert torch.equal(rounded.zeros, rounded.zeros.round().clamp(0, 7))
    assert rounded.proxy < 0.1


def test_an_asymmetric_grid_wins_on_shifted_weights_and_groups_win_on_uneven_ones(layer):
    W, H = layer(20, 64, 2)
    shifted = W.abs()
    loss = [
        quantize_layer(shifted, H, LayerSettings(bits=3, sym=sym), seed=0).proxy
        for sym in (True, False)
    ]
    assert loss[1] < 0.7 * loss[0]
    uneven = W.clone()
    uneven[:, 32:] *= 20
    grouped = [
        quantize_layer(uneven, torch.eye(64), LayerSettings(bits=2, group_size=size), seed=0)
        for size in (-1, 32)
    ]
    assert grouped[1].proxy < grouped[0].proxy


def test_stochastic_rounding_is_unbiased_inside_the_grid():
    W = 0.3 * torch.randn(4, 16)
    options = LayerSettings(bits=4, method="nearest", unbiased=True, scale_dtype="float32")
    nearest = quantize_layer(W, torch.eye(16), LayerSettings(bits=4, method="nearest"), seed=0)
    inside = (nearest.codes > 0) & (nearest.codes < 15)
    mean = torch.stack(
        [quantize_layer(W, torch.eye(16), options, seed=seed).dequantize() for seed in range(150)]
    ).mean(0)
    step = nearest.scales.max()
    assert (mean - W)[inside].abs().max() < 5 * 0.5 * step / 150**0.5
    assert (nearest.dequantize() - W)[inside].abs().max() > 0.3 * step


def test_the_same_inputs_give_the_same_bits(layer):
    W, H = layer(24, 60, 1)
    options = LayerSettings(bits=2, incoherence="hadamard", rescale=True)
    first, again = (quantize_layer(W, H, options, seed=4) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)
    assert first.proxy == again.proxy
    other = quantize_layer(W, H, options, seed=5)
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", ["dead", "rank one", "zero", "constant", "zero rows", "one column"]
)
def test_degenerate_hessians_and_weights_are_handled(layer, method, case):
    W, H = layer(10, 24, 5)
    if case == "dead":
        H[:, ::3] = 0
        H[::3] = 0
    elif case == "rank one":
        x = torch.randn(24)
        H = torch.outer(x, x)
    elif case == "zero":
        H = torch.zeros(24, 24)
    elif case == "constant":
        H = torch.ones(24, 24)
    elif case == "zero rows":
        W[::2] = 0
    else:
        W, H = W[:, :1].contiguous(), H[:1, :1].contiguous()
    for incoherence in ("none", "hadamard"):
        options = LayerSettings(bits=4, method=method, incoherence=incoherence, rescale=True)
        rounded = quantize_layer(W, H, options, seed=0)
        assert torch.isfinite(rounded.dequantize()).all()
        assert 0 <= rounded.proxy < 0.2
        if case == "zero rows":
            assert (rounded.dequantize()[::2] == 0).all()


def test_a_dead_input_keeps_a_useful_weight(layer):
    """Upstream sets it to zero, which is wrong as soon as the input comes alive."""
    W, H = layer(10, 24, 5)
    H[:, 3] = 0
    H[3] = 0
    rounded = quantize_layer(W, H, LayerSettings(bits=4, method="gptq"), seed=0)
    assert (rounded.dequantize()[:, 3] - W[:, 3]).abs().max() < rounded.scales.max()


def test_refusals_name_what_is_wrong():
    W, H = torch.randn(3, 4), torch.eye(4)
    options = LayerSettings()
    with pytest.raises(ValueError, match=r"^weight must be finite, got nan or inf$"):
        quantize_layer(W * float("nan"), H, options, seed=0)
    with pytest.raises(ValueError, match=r"^hessian must be finite, got nan or inf$"):
        quantize_layer(W, H / 0, options, seed=0)
    with pytest.raises(
        ValueError,
        match=r"^hessian must have shape \(4, 4\) for a weight of shape \(3, 4\), got \(5, 5\)$",
    ):
        quantize_layer(W, torch.eye(5), options, seed=0)
    with pytest.raises(
        ValueError, match=r"^hessian must have a diagonal of at least 0, got a negative entry$"
    ):
        quantize_layer(W, -H, options, seed=0)
    with pytest.raises(ValueError, match=r"^weight must have shape \(m, d\), got \(4,\)$"):
        quantize_layer(W[0, :], H, options, seed=0)
    indefinite = torch.eye(4) + 5 * (torch.ones(4, 4) - torch.eye(4))
    with pytest.raises(
        ValueError, match=r"^the Hessian must be positive semi-definite, got an indefinite one$"
    ):
        quantize_layer(W, indefinite, options, seed=0)
    with pytest.raises(
        ValueError, match=r"^scales must fit float16, got 2e\+05; use scale_dtype='float32'$"
    ):
        quantize_layer(torch.full((1, 4), 3e5), H, options, seed=0)


def test_proxy_loss_of_nothing_is_nothing():
    assert proxy_loss(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize("group_size", [-1, 8])
def test_proposals_for_a_whole_tile_give_the_codes_of_one_column_after_the_other(group_size):
    from rlo_gptq.rounding import greedy

    g = torch.Generator().manual_seed(5)
    d, m = 150, 33
    W, H = torch.randn(d, m, generator=g, dtype=torch.float64), psd(d, g)
    grid = fit_grid(W, H.diagonal(), LayerSettings(bits=2, group_size=group_size))
    order = torch.randperm(d, generator=g)
    codes = torch.randint(4, (d, m), generator=g).to(W)  # far from the best: most columns move
    states = [start(W[order], H[order][:, order], codes.clone(), grid, order) for _ in range(2)]
    changed = greedy_pass(states[0], grid)
    block = greedy._proposed_block
    try:
        greedy._proposed_block = greedy._torch_block
        assert greedy_pass(states[1], grid) == changed > d * m / 2
    finally:
        greedy._proposed_block = block
    assert torch.equal(states[0].codes, states[1].codes)
    torch.testing.assert_close(states[0].gradient, states[1].gradient)


def test_later_refits_need_no_product_and_are_the_first_refits_formula():
    g = torch.Generator().manual_seed(2)
    W, H = torch.randn(30, 7, generator=g, dtype=torch.float64), psd(30, g)
    grid, order = plain_grid(W, 2), torch.arange(30)
    kept = start(W, H, grid.round_all(W), grid, order)
    refit_scales(kept, grid, group_size=-1, scale_dtype="float32")
    greedy_pass(kept, grid)
    fresh = start(W, H, kept.codes.clone(), grid, order)
    again = ScalarGrid(grid.scales.clone(), grid.zeros, 2, grid.group)
    refit_scales(kept, grid, group_size=-1, scale_dtype="float32")
    refit_scales(fresh, again, group_size=-1, scale_dtype="float32")
    torch.testing.assert_close(grid.scales, again.scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.gradient, fresh.gradient)
