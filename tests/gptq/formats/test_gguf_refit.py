"""Scales and offsets of blocks, moved together after rounding, against least squares."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.formats.gguf.fit import fit_blocks
from rlo_gptq.formats.gguf.refit import refit_blocks
from rlo_gptq.formats.gguf.round import round_to_blocks
from rlo_gptq.formats.gguf.types import BLOCK_TYPES
from rlo_gptq.rounding.greedy import start
from rlo_gptq.settings import LayerSettings
from rlo_gptq.synthetic import make_layer

WITH_OFFSETS = ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"]


def rounded(kind, columns, m=24):
    """A layer rounded to the nearest, with its Hessian, in an order that is not the columns'."""
    W, H = make_layer(m, columns, 3)
    H = H / H.diagonal().max()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    x = W.T.contiguous()
    grid = fit_blocks(x, torch.ones(columns), BLOCK_TYPES[kind])
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    codes = grid.round_all(x)
    return start(x[order], H[order][:, order].contiguous(), codes[order], grid, order), grid


@pytest.mark.parametrize("kind", WITH_OFFSETS)
def test_no_rows_loss_rises_and_the_state_stays_what_the_grid_says(kind):
    state, grid = rounded(kind, 512)
    before = state.loss()
    refit_blocks(state, grid)
    after = state.loss()
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    values = grid.values(state.codes, state.order)
    torch.testing.assert_close(state.values, values, atol=1e-5, rtol=1e-4)
    error = state.values - state.weight
    torch.testing.assert_close(state.gradient, state.hessian @ error, atol=1e-5, rtol=1e-3)
    for numbers in (grid.scales, grid.offsets):
        assert torch.equal(numbers, numbers.half().float())
    assert bool((grid.scales > 0).all())


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_one_block_reaches_the_least_squares_of_its_codes(kind):
    state, grid = rounded(kind, 32)
    refit_blocks(state, grid)
    found = state.loss()
    root = torch.linalg.cholesky(state.hessian.double()).T
    for row in range(state.weight.shape[1]):
        a = grid.units(state.codes, state.order)[:, row].double()
        design = root @ torch.stack([a, torch.ones_like(a)], 1)
        target = (root @ state.weight[:, row].double())[:, None]
        best = torch.linalg.lstsq(design, target).solution
        least = float((design @ best - target).square().sum())
        # Scale and offset are stored in half precision, which costs some per cent at 32 levels.
        assert least * (1 - 1e-4) < float(found[row]) < 1.06 * least


def test_rounding_onto_a_grid_with_offsets_gains_by_it(monkeypatch):
    W, H = make_layer(48, 256, 0)
    settings = LayerSettings(method="gptq")
    ours = round_to_blocks(W, H, BLOCK_TYPES["Q4_1"], settings, seed=0).proxy
    monkeypatch.setattr("rlo_gptq.formats.gguf.grids.BlockGrid.refit", lambda self, state: False)
    before = round_to_blocks(W, H, BLOCK_TYPES["Q4_1"], settings, seed=0).proxy
    assert ours < 0.99 * before
