"""The six methods, put together from feedback, greedy passes and scale fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.grids import Grid, ScalarGrid, fit_grid
from rlo_gptq.incoherence import random_uniforms
from rlo_gptq.rounding.admm import bounded_feedback
from rlo_gptq.rounding.feedback import factor, round_with_feedback
from rlo_gptq.rounding.greedy import Rounding, greedy_pass, refit_scales, start
from rlo_gptq.settings import LayerSettings

_NOISE_STREAM = 64
FITS = 1  # times the grid is fitted again, to the targets that feedback makes


@dataclass
class Rounded:
    """Codes (d, m), columns in their own order, and the grid that reads them."""

    codes: Tensor
    grid: Grid


def visiting_order(hessian: Tensor, settings: LayerSettings) -> Tensor:
    """Return the order in which the method visits columns, int64 (d,).

    `ldlq` goes from the last column to the first, as the authors' does, `gptq` from the first to
    the last; the others by falling diag(H), so that what matters most is rounded while there is
    most left to correct it.
    """
    d = len(hessian)
    if settings.method in ("ldlqRG", "allbal", "ldlbal_admm") or (
        settings.method == "gptq" and settings.act_order
    ):
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    natural = torch.arange(d, device=hessian.device)
    return natural.flip(0) if settings.method == "ldlq" else natural


def round_matrix(weight: Tensor, hessian: Tensor, settings: LayerSettings, *, seed: int) -> Rounded:
    """Round a transposed weight (d, m) against a damped Hessian (d, d)."""
    order = visiting_order(hessian, settings)
    W, H = weight[order], hessian[order][:, order]
    grid, codes = _first_codes(W, H, order, settings, seed)
    state = start(W, H, codes, grid, order)
    _descend(state, grid, settings)
    own = torch.empty_like(state.codes)
    own[order] = state.codes
    return Rounded(own, grid)


def _first_codes(
    W: Tensor, H: Tensor, order: Tensor, settings: LayerSettings, seed: int
) -> tuple[ScalarGrid, Tensor]:
    own = torch.argsort(order)
    if settings.method in ("nearest", "allbal"):
        grid = fit_grid(W[own], H.diagonal()[own], settings)
        return grid, _nearest(W[own], grid, settings, seed)[order]
    factors = factor(H)
    feedback = bounded_feedback(H) if settings.method == "ldlbal_admm" else factors.feedback
    importance = factors.diagonal[own]
    grid = fit_grid(W[own], importance, settings)
    noise = None
    for _ in range(FITS):
        _, targets = round_with_feedback(W, feedback, grid, order, block_size=settings.block_size)
        grid = fit_grid(targets[own], importance, settings)
    if settings.unbiased:
        noise = _noise(grid, seed)[order]
    codes, _ = round_with_feedback(
        W, feedback, grid, order, block_size=settings.block_size, noise=noise
    )
    return grid, codes


def _nearest(x: Tensor, grid: ScalarGrid, settings: LayerSettings, seed: int) -> Tensor:
    return grid.round_all(x + _noise(grid, seed)) if settings.unbiased else grid.round_all(x)


def _noise(grid: ScalarGrid, seed: int) -> Tensor:
    """Return uniform noise of one step of the grid, (d, m): with it, rounding is unbiased."""
    d, m = len(grid.group), grid.scales.shape[1]
    uniform = random_uniforms(seed, _NOISE_STREAM, d * m).view(d, m).to(grid.scales)
    return (uniform - 0.5) * grid.scales[grid.group]


def _descend(state: Rounding, grid: Grid, settings: LayerSettings) -> None:
    """Alternate greedy passes with refits of the scales."""

    def refit() -> None:
        if settings.refit and not settings.unbiased:
            refit_scales(
                state,
                grid,
                per_tensor=settings.group_size == 0,
                scale_dtype=settings.scale_dtype,
            )

    refit()
    for _ in range(settings.passes):
        changed = greedy_pass(state, grid, block_size=settings.block_size)
        refit()
        if not changed:
            break
