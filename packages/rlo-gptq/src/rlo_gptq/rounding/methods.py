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
from rlo_gptq.rounding.trellis import fit_trellis
from rlo_gptq.settings import LayerSettings

_NOISE_STREAM = 64
_REFIT_AFTER = 1e-3  # of the codes changed by a pass


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
) -> tuple[Grid, Tensor]:
    """Fit the grid and round once; the codes are in the order of visiting."""
    own = torch.argsort(order)
    trellis = settings.grid == "trellis"
    if settings.method in ("nearest", "allbal"):
        scalar = fit_grid(W[own], H.diagonal()[own], settings)
        if settings.unbiased:
            return scalar, scalar.round_all(W[own] + _noise(scalar, seed))[order]
        grid: Grid = fit_trellis(W[own], settings) if trellis else scalar
        return grid, grid.round_all(W[own])[order]
    factors = factor(H)
    feedback = bounded_feedback(H) if settings.method == "ldlbal_admm" else factors.feedback
    importance = factors.diagonal[own]
    # The grid has to fit what feedback makes of the weights, which a first rounding tells.
    scalar = fit_grid(W[own], importance, settings)
    _, targets = round_with_feedback(W, feedback, scalar, order, block_size=settings.block_size)
    scalar = fit_grid(targets[own], importance, settings)
    noise = _noise(scalar, seed)[order] if settings.unbiased else None
    grid = fit_trellis(targets[own], settings) if trellis else scalar
    codes, _ = round_with_feedback(
        W, feedback, grid, order, block_size=settings.block_size, noise=noise
    )
    return grid, codes


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
        # A refit costs as much as a pass; it follows those passes that moved something.
        if changed > state.codes.numel() * _REFIT_AFTER:
            refit()
        if not changed:
            break
    refit()
