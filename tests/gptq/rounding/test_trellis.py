"""Trellis-coded rounding: brute force, its own decoder, and the loss against the scalar grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from rlo_gptq.rounding.greedy import greedy_pass, start
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.rounding.trellis import (
    STATES,
    SYMBOLS,
    codebook,
    decode,
    decode_rows,
    encode,
    fit_trellis,
    sequence_lengths,
)
from rlo_gptq.settings import LayerSettings

CPU = torch.device("cpu")


def test_the_codebook_is_gaussian_with_unit_variance():
    values = codebook(CPU, torch.float64)
    assert len(values.unique()) == STATES
    assert abs(values.mean()) < 1e-6
    assert values.square().mean() == pytest.approx(1.0, abs=1e-6)
    assert values.pow(4).mean() == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("m", [1, 3, 63, 64, 127, 172, 257, 576, 1009, 1536, 4096, 11008])
def test_sequences_cover_the_rows_in_lengths_near_128(m):
    lengths = sequence_lengths(m)
    assert sum(lengths) == m
    assert max(lengths) - min(lengths) <= 1
    if m >= 64:
        assert all(60 <= n <= 256 for n in lengths)


def test_a_value_is_looked_up_by_the_last_five_codes_around_the_seam():
    lengths = [6, 7]
    codes = torch.randint(4, (13,))
    for start_, n in ((0, 6), (6, 7)):
        for i in range(n):
            state = 0
            for back in reversed(range(SYMBOLS)):
                state = 4 * state + int(codes[start_ + (i - back) % n])
            assert decode(codes, lengths)[start_ + i] == codebook(CPU)[state]


def test_tiles_of_whole_sequences_decode_as_the_matrix_does():
    codes = torch.randint(4, (3, 1009))
    lengths = sequence_lengths(1009)
    whole, first = decode(codes), 0
    for n in lengths:
        assert torch.equal(decode(codes[:, first : first + n], [n]), whole[:, first : first + n])
        first += n
    for start_, stop in ((0, 1009), (0, 1), (1008, 1009), (100, 131), (5, 900)):
        tile = decode_rows(lambda a, b: codes.T[a:b], 1009, start_, stop)
        assert torch.equal(tile, whole.T[start_:stop])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_encoding_a_short_sequence_is_as_good_as_brute_force(n):
    every = torch.tensor(list(itertools.product(range(4), repeat=n)))
    values = decode(every, [n]).double()
    worst = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, generator=g, dtype=torch.float64)
        weight = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
        best = ((x - values).square() * weight).sum(1).min()
        found = ((x - decode(encode(x, weight)).double()).square() * weight).sum()
        assert found >= best - 1e-9
        worst.append(float((found - best) / weight.sum()))
    # Below five codes the search is exhaustive; above, the four codes at the seam are a guess.
    assert max(worst) < 1e-6 if n < SYMBOLS else sum(worst) / len(worst) < 0.5


def test_a_gaussian_is_coded_far_better_than_four_levels_can():
    x = torch.randn(4096)
    error = (x - decode(encode(x, torch.ones_like(x)))).square().mean() / x.square().mean()
    # 0.1175 is the least that any four levels reach, 0.0625 the rate-distortion limit.
    assert 0.0625 < error < 0.085


def test_no_pass_raises_the_loss():
    x = torch.randn(40, 12)
    H = x.T @ x
    W = torch.randn(12, 70)
    grid = fit_trellis(W, LayerSettings(grid="trellis"))
    order = torch.arange(12)
    state = start(W, H, grid.round_all(W), grid, order)
    for _ in range(3):
        before = state.loss().sum()
        greedy_pass(state, grid)
        assert state.loss().sum() <= before * (1 + 1e-6)
    torch.testing.assert_close(state.values, grid.values(state.codes, order))


@pytest.mark.parametrize("group_size", [-1, 0, 12])
def test_a_layer_decodes_to_what_was_measured(layer, group_size):
    W, H = layer(70, 32, 0)
    options = {"incoherence": "hadamard", "rescale": True, "group_size": group_size}
    scalar = quantize_layer(W, H, LayerSettings(**options), seed=0)
    trellis = quantize_layer(W, H, LayerSettings(grid="trellis", **options), seed=0)
    assert trellis.grid == "trellis"
    assert int(trellis.codes.max()) <= 3
    assert trellis.proxy < 0.8 * scalar.proxy
    error = (W - trellis.dequantize()).double()
    expected = (error @ H.double() @ error.T).trace() / (
        W.double() @ H.double() @ W.double().T
    ).trace()
    assert trellis.proxy == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", ["nearest", "gptq", "ldlq", "allbal"])
@pytest.mark.parametrize("m", [1, 4, 7, 70])
def test_every_method_and_height_works(method, m):
    W, H = torch.randn(m, 20), torch.eye(20)
    W[0] = 0
    options = LayerSettings(grid="trellis", method=method, npasses=1)
    rounded = quantize_layer(W, H, options, seed=0)
    assert torch.isfinite(rounded.dequantize()).all()
    assert (rounded.dequantize()[0] == 0).all()
    assert rounded.proxy < 0.3


@pytest.mark.parametrize(("m", "group_size"), [(70, -1), (300, 24)])
def test_a_packed_layer_computes_with_the_trellis_values(m, group_size, monkeypatch):
    """Tiles of rows that cut through sequences, and the gradient to the inputs."""
    from rlo_gptq.packed import quant_linear, tiles

    W = torch.randn(m, 32)
    settings = LayerSettings(
        grid="trellis", method="nearest", incoherence="hadamard", group_size=group_size
    )
    layer = quantize_layer(W, torch.eye(32), settings, seed=0)
    packed = quant_linear.QuantLinear.from_layer(layer, settings)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 32 * 50)
    x = torch.randn(5, 32, requires_grad=True)
    dense = layer.dequantize()
    torch.testing.assert_close(packed(x), x @ dense.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.dequantize(), dense, atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad(packed(x).sum(), x)
    torch.testing.assert_close(slope, dense.sum(0).expand(5, 32), atol=1e-4, rtol=1e-4)
