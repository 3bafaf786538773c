"""Trellis-coded rounding: brute force, its own decoder, and the loss against the scalar grid."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from rlo_gptq.rounding import viterbi
from rlo_gptq.rounding.greedy import greedy_pass, start
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.rounding.trellis import Trellis, decode, decode_rows, permuted_states
from rlo_gptq.rounding.trellis_grid import fit_trellis
from rlo_gptq.rounding.viterbi import encode, search_of
from rlo_gptq.settings import LayerSettings

CPU = torch.device("cpu")
OLD = Trellis(2, 10)
KINDS = [Trellis(bits, L) for bits in (1, 2, 3, 4) for L in (10, 12, 14, 16)]


def described(trellis):
    return f"{trellis.bits}-{trellis.state_bits}"


@pytest.mark.parametrize("L", [10, 12, 14, 16])
def test_the_codebook_is_gaussian_with_unit_variance(L):
    values = Trellis(2, L).values(CPU, torch.float64)
    assert len(values.unique()) == 1 << L
    assert abs(values.mean()) < 1e-6
    assert values.square().mean() == pytest.approx(1.0, abs=1e-6)
    assert values.pow(4).mean() == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("L", [12, 14, 16])
def test_the_computed_order_is_a_permutation_of_the_states(L):
    ranks = permuted_states(torch.arange(1 << L), L)
    assert torch.equal(ranks.sort().values, torch.arange(1 << L))


def test_a_checkpoint_of_the_first_kind_is_read_as_it_was_written():
    """Codes and values of the release that had one kind of trellis, written down from it."""
    codes = (torch.arange(131) * 7 + torch.arange(131) ** 2 // 5) % 4
    values = decode(codes, OLD)
    assert OLD.lengths(131) == [131]
    assert OLD.lengths(1009) == [127, *[126] * 7]
    expected = [-0.752316, -0.843204, 2.054651, 0.566514, -0.498771, -1.18744]
    torch.testing.assert_close(values[[0, 1, 2, 3, 64, 130]], torch.tensor(expected))


@pytest.mark.parametrize("L", [10, 16])
@pytest.mark.parametrize("m", [1, 3, 63, 64, 127, 172, 257, 576, 1009, 1536, 4096, 11008])
def test_sequences_cover_the_rows_in_lengths_near_the_one_that_is_wanted(m, L):
    trellis = Trellis(2, L)
    lengths, wanted = trellis.lengths(m), trellis.sequence
    assert sum(lengths) == m
    assert max(lengths) - min(lengths) <= 1
    if m >= wanted / 2:
        assert all(0.45 * wanted <= n <= 2 * wanted for n in lengths)


@pytest.mark.parametrize("trellis", KINDS, ids=described)
def test_a_value_is_looked_up_by_the_last_codes_around_the_seam(trellis):
    lengths = [6, 6, 19]
    codes = torch.randint(1 << trellis.bits, (31,))
    found, values = decode(codes, trellis, lengths), trellis.values(CPU)
    for first, n in ((0, 6), (6, 6), (12, 19)):
        for i in range(n):
            state = 0
            for back in reversed(range(trellis.symbols)):
                state = (state << trellis.bits) + int(codes[first + (i - back) % n])
            assert found[first + i] == values[state % trellis.states]


@pytest.mark.parametrize("trellis", [OLD, Trellis(3, 14), Trellis(1, 16)], ids=described)
def test_tiles_of_rows_decode_as_the_matrix_does(trellis):
    for m in (5, 19, 1009):
        codes = torch.randint(1 << trellis.bits, (m, 3), dtype=torch.uint8)
        whole = decode(codes.T, trellis).T
        for start_, stop in ((0, m), (0, 1), (m - 1, m), (m // 3, m // 2), (2, m - 1)):
            tile = decode_rows(lambda a, b, codes=codes: codes[a:b], trellis, m, start_, stop)
            assert torch.equal(tile, whole[start_:stop])


@pytest.mark.parametrize("trellis", [OLD, Trellis(3, 10), Trellis(1, 10)], ids=described)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_encoding_a_short_sequence_is_as_good_as_brute_force(n, trellis):
    n = min(n, 14 // trellis.bits) if trellis.bits > 1 else n + 2
    every = torch.tensor(list(itertools.product(range(1 << trellis.bits), repeat=n)))
    values = decode(every, trellis, [n]).double()
    worst = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, generator=g, dtype=torch.float64)
        weight = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
        best = ((x - values).square() * weight).sum(1).min()
        code = encode(x, weight, trellis)
        found = ((x - decode(code, trellis).double()).square() * weight).sum()
        assert found >= best - 1e-9
        worst.append(float((found - best) / weight.sum()))
    # Below a state's codes the search is exhaustive; above, the codes at the seam are a guess.
    assert max(worst) < 1e-6 if n < trellis.symbols else sum(worst) / len(worst) < 0.5


@pytest.mark.parametrize(
    "trellis", [OLD, Trellis(1, 12), Trellis(3, 12), Trellis(4, 10)], ids=described
)
@pytest.mark.parametrize("compiled", [False, True])
def test_between_fixed_ends_the_search_is_exact(trellis, compiled):
    """Against dynamic programming over all states in float64, written without its layout."""
    if compiled:
        pytest.importorskip("numba")
    n, K, inner = 9 + trellis.symbols, 1 << trellis.bits, trellis.states >> trellis.bits
    x, weight = torch.randn(2, n), torch.rand(2, n) + 0.5
    seam = torch.randint(inner, (2,))
    found = search_of(CPU, trellis, compiled=compiled)(x, weight, seam)
    values = trellis.values(CPU, torch.float64)
    states = torch.arange(trellis.states)
    for row in range(2):
        cost = torch.full((trellis.states,), torch.inf, dtype=torch.float64)
        cost[states % inner == seam[row]] = 0
        for t in range(n):
            arrived = torch.full_like(cost, torch.inf)
            for oldest in range(K):
                arrived = torch.minimum(arrived, cost[oldest * inner + (states >> trellis.bits)])
            cost = arrived + weight[row, t].double() * (x[row, t].double() - values).square()
        best = float(cost[states % inner == seam[row]].min())
        state, error = int(seam[row]), 0.0
        for t, code in enumerate(found[row].tolist()):
            state = ((state << trellis.bits) + code) % trellis.states
            error += float(weight[row, t]) * (float(x[row, t]) - float(values[state])) ** 2
        assert state % inner == seam[row]
        assert error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("trellis", [OLD, Trellis(3, 14), Trellis(1, 12)], ids=described)
def test_compiled_loops_and_torch_find_the_same_codes(trellis, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(viterbi, "_KEPT", 70 * trellis.states >> trellis.bits)
    x, weight = torch.randn(3, 40), torch.rand(3, 40)
    for seam in (None, torch.randint(trellis.states >> trellis.bits, (3,))):
        one = search_of(CPU, trellis, compiled=False)(x, weight, seam)
        assert torch.equal(one, search_of(CPU, trellis, compiled=True)(x, weight, seam))


@pytest.mark.parametrize("without", [False, True])
def test_without_numba_the_codes_are_the_same(without, monkeypatch):
    x, weight = torch.randn(300), torch.rand(300)
    expected = encode(x, weight, OLD)
    if without:
        monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
        monkeypatch.delitem(sys.modules, "rlo_gptq.rounding.viterbi_numba", raising=False)
    viterbi.compiler_works.cache_clear()
    try:
        assert not (without and viterbi.compiler_works())
        assert torch.equal(encode(x, weight, OLD), expected)
    finally:
        viterbi.compiler_works.cache_clear()


def squared_error(trellis, n=4096):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    found = decode(encode(x, torch.ones_like(x), trellis), trellis)
    return float((x - found).square().mean() / x.square().mean())


def test_a_gaussian_is_coded_far_better_than_four_levels_can():
    # 0.1175 is the least that any four levels reach, 0.0625 the rate-distortion limit.
    assert 0.0625 < squared_error(OLD) < 0.081
    assert 0.0625 < squared_error(Trellis(2, 12)) < 0.076


@pytest.mark.slow
def test_states_of_16_bits_come_near_the_limit_at_every_rate():
    pytest.importorskip("numba")
    for bits, most in ((1, 0.275), (2, 0.0695), (3, 0.0178), (4, 0.0047)):
        error = squared_error(Trellis(bits, 16), 8192)
        assert 4.0**-bits < error < most, bits


def test_no_pass_raises_the_loss():
    x = torch.randn(40, 12)
    H = x.T @ x
    W = torch.randn(12, 70)
    grid = fit_trellis(W, LayerSettings(grid="trellis"), OLD)
    order = torch.arange(12)
    state = start(W, H, grid.round_all(W), grid, order)
    for _ in range(3):
        before = state.loss().sum()
        greedy_pass(state, grid)
        assert state.loss().sum() <= before * (1 + 1e-6)
    torch.testing.assert_close(state.values, grid.values(state.codes, order))


@pytest.mark.parametrize(
    ("grid", "bits", "group_size"),
    [("trellis", 2, -1), ("trellis", 2, 0), ("trellis:L=12", 3, 12), ("trellis:L=12", 4, -1)],
)
def test_a_layer_decodes_to_what_was_measured(layer, grid, bits, group_size):
    W, H = layer(70, 32, 0)
    options = {"incoherence": "hadamard", "rescale": True, "group_size": group_size, "bits": bits}
    scalar = quantize_layer(W, H, LayerSettings(**options), seed=0)
    trellis = quantize_layer(W, H, LayerSettings(grid=grid, **options), seed=0)
    assert trellis.grid == grid
    assert int(trellis.codes.max()) < 1 << bits
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


@pytest.mark.parametrize(
    ("m", "group_size", "grid", "bits"),
    [(70, -1, "trellis", 2), (300, 24, "trellis", 2), (300, -1, "trellis:L=12", 1)],
)
def test_a_packed_layer_computes_with_the_trellis_values(m, group_size, grid, bits, monkeypatch):
    """Tiles of rows that cut through sequences, and the gradient to the inputs."""
    from rlo_gptq.packed import quant_linear, tiles

    W = torch.randn(m, 32)
    settings = LayerSettings(
        bits=bits, grid=grid, method="nearest", incoherence="hadamard", group_size=group_size
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
