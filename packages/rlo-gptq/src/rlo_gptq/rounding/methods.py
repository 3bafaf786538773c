"""The six methods, put together from feedback, greedy passes and scale fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.rounding.admm import bounded_feedback
from rlo_gptq.rounding.feedback import COPY_ROWS, Factor, factor, round_with_feedback
from rlo_gptq.rounding.greedy import Rounding, greedy_pass, refit_scales, start
from rlo_gptq.rounding.grids import Grid, ScalarGrid, check_scales, fit_grid
from rlo_gptq.rounding.random_streams import random_uniforms
from rlo_gptq.rounding.trellis import trellis_of
from rlo_gptq.rounding.trellis_grid import fit_trellis
from rlo_gptq.rounding.viterbi import search_bytes
from rlo_gptq.settings import LayerSettings

Fit = Callable[[Tensor, Tensor, bool], Grid]
"""From targets (d, m), the importance (d,) of columns and whether it is the last fit to a grid."""

_NOISE_STREAM = 64
# Outputs that are rounded at one time, on a CPU and on a GPU. Fewer would need less memory, but
# each column costs some twenty calls, whose own time 2048 outputs outweigh.
OUTPUTS = (2048, 16384)
_REFIT_AFTER = 1e-3  # of the codes changed by a pass
LOOKS_AFTER = 4
"""Passes on CUDA until the host asks how many codes changed, for which the device has to stop."""


@dataclass
class Rounded:
    """Codes (d, m), uint8 from `round_matrix`, in their own order, and the grid that reads them."""

    codes: Tensor
    grid: Grid


def visiting_order(hessian: Tensor, settings: LayerSettings) -> Tensor:
    """Return the order in which the method visits columns, int64 (d,).

    `ldlq` goes from the last column to the first, as the authors' does, `gptq` from the first to
    the last; the others by falling diag(H), so that what matters most is rounded while there is
    most left to correct it.
    """
    d = len(hessian)
    natural = torch.arange(d, device=hessian.device)
    if _left_to_right(settings):
        return natural
    if settings.method == "ldlq":
        return natural.flip(0)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _left_to_right(settings: LayerSettings) -> bool:
    act_order = settings.method == "gptq" and settings.act_order
    return settings.method in ("nearest", "gptq") and not act_order


def round_matrix(weight: Tensor, hessian: Tensor, settings: LayerSettings, *, seed: int) -> Rounded:
    """Round a transposed weight (d, m) against a damped Hessian (d, d)."""
    return round_in_parts(
        lambda part: weight[:, part], weight.shape[1], hessian.clone(), settings, seed=seed
    )


def round_in_parts(
    weight: Callable[[slice], Tensor],
    outputs: int,
    hessian: Tensor,
    settings: LayerSettings,
    *,
    seed: int,
    fit: Fit | None = None,
) -> Rounded:
    """Round a transposed weight (d, m) that is made some outputs at a time.

    The rows of W do not depend on each other, so that what rounding needs besides the Hessian and
    its factor is a few times (d, 2048) however many outputs there are.

    Args:
        weight: gives (d, some) of the outputs in a slice.
        outputs: m.
        hessian: damped, (d, d); it is overwritten.
        settings: the method and its options.
        seed: of stochastic rounding.
        fit: makes a grid of another format; by default the one that `settings` describes.
    """
    order = visiting_order(hessian, settings)
    if not _left_to_right(settings):
        permute_(hessian, order)
    factors = None if settings.method in ("nearest", "allbal") else factor(hessian)
    if factors is not None and settings.method == "ldlbal_admm":
        factors.feedback = torch.empty(0)  # room for the other one
        factors.feedback = bounded_feedback(hessian)
    codes = torch.empty(len(order), outputs, dtype=torch.uint8, device=hessian.device)
    grids: list[Grid] = []
    step = outputs if _indivisible(settings) else OUTPUTS[hessian.device.type == "cuda"]
    for begin in range(0, outputs, step):
        part = slice(begin, min(begin + step, outputs))
        W = weight(part)
        W = W.contiguous() if _left_to_right(settings) else W[order]
        grid, first = _first_codes(W, hessian, factors, order, settings, seed, fit)
        if part.stop == outputs:
            factors = None  # room for the greedy passes
        state = start(W, hessian, first, grid, order)
        _descend(state, grid, settings)
        check_scales(grid, W, settings)
        codes[order, part] = state.codes.to(torch.uint8)
        grids.append(grid)
    return Rounded(codes, _joined(grids))


def rounding_bytes(m: int, d: int, settings: LayerSettings, *, cuda: bool = False) -> int:
    """Return the memory that rounding a weight (m, d) takes at most, besides the weight itself.

    Of (d, d) there are the Hessian, its rotated and damped form, and the factor: three; without
    feedback two; the bounded feedback of `ldlbal_admm` is solved for with eight. Of (d, outputs)
    there are six: targets, codes, values, gradient, and two while scales are fitted. A trellis
    keeps the costs of a sequence's states beside them.
    """
    squares = {"nearest": 2, "allbal": 2, "ldlbal_admm": 8}.get(settings.method, 3)
    outputs = m if _indivisible(settings) else min(m, OUTPUTS[cuda])
    trellis = trellis_of(settings.grid, settings.bits)
    searched = 0 if trellis is None else search_bytes(m, trellis)
    return 4 * (squares * d * d + 6 * d * outputs) + searched


def _indivisible(settings: LayerSettings) -> bool:
    """Whether outputs share something: a scale, a trellis, or the numbers of one random stream."""
    return settings.group_size == 0 or settings.grid != "scalar" or settings.unbiased


def _joined(grids: list[Grid]) -> Grid:
    """Return the grid of all outputs."""
    first, *others = grids
    return first.join(others) if others else first


def permute_(matrix: Tensor, order: Tensor) -> None:
    """Permute the rows and the columns of a square matrix in place, strip by strip."""
    size = COPY_ROWS * (8 if matrix.is_cuda else 1)
    strips = [slice(begin, begin + size) for begin in range(0, len(matrix), size)]
    for strip in strips:
        matrix[strip] = matrix[strip][:, order]
    for strip in strips:
        matrix[:, strip] = matrix[:, strip][order]


def _first_codes(
    W: Tensor,
    H: Tensor,
    factors: Factor | None,
    order: Tensor,
    settings: LayerSettings,
    seed: int,
    fit: Fit | None,
) -> tuple[Grid, Tensor]:
    """Fit the grid and round once; the codes are in the order of visiting."""
    own = torch.argsort(order)
    if fit is not None:
        return _first_codes_of(W, H, factors, order, settings, fit)
    trellis = trellis_of(settings.grid, settings.bits)
    if factors is None:
        scalar = fit_grid(W[own], H.diagonal()[own], settings)
        if settings.unbiased:
            return scalar, scalar.round_all(W[own] + _noise(scalar, seed))[order]
        grid: Grid = scalar if trellis is None else fit_trellis(W[own], settings, trellis)
        return grid, grid.round_all(W[own])[order]
    feedback, size = factors.feedback, settings.block_size
    importance = factors.diagonal[own]
    # The grid has to fit what feedback makes of the weights, which a first rounding tells, to a
    # grid that need not be the best.
    scalar = fit_grid(W[own], importance, settings)
    targets = round_with_feedback(W, feedback, scalar, order, block_size=size)[1][own]
    scalar = fit_grid(targets, importance, settings)
    noise = _noise(scalar, seed)[order] if settings.unbiased else None
    grid = scalar if trellis is None else fit_trellis(targets, settings, trellis)
    del targets
    return grid, round_with_feedback(W, feedback, grid, order, block_size=size, noise=noise)[0]


def _first_codes_of(
    W: Tensor,
    H: Tensor,
    factors: Factor | None,
    order: Tensor,
    settings: LayerSettings,
    fit: Fit,
) -> tuple[Grid, Tensor]:
    """The same for a grid that `fit` makes."""
    own = torch.argsort(order)
    if factors is None:
        grid = fit(W[own], H.diagonal()[own], True)
        return grid, grid.round_all(W[own])[order]
    importance, size = factors.diagonal[own], settings.block_size
    grid = fit(W[own], importance, False)
    targets = round_with_feedback(W, factors.feedback, grid, order, block_size=size)[1][own]
    grid = fit(targets, importance, True)
    return grid, round_with_feedback(W, factors.feedback, grid, order, block_size=size)[0]


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
                group_size=settings.group_size,
                scale_dtype=settings.scale_dtype,
            )

    refit()
    looks = LOOKS_AFTER if state.codes.is_cuda else 1
    stale = False
    for done in range(1, settings.passes + 1):
        changed = greedy_pass(state, grid, block_size=settings.block_size)
        if done % looks and done < settings.passes:
            # Many scales take sixty launches, one takes twenty.
            if len(grid.scales) == 1 or done % 2 == 0:
                refit()
            continue
        moved = int(changed)
        stale = stale or moved > 0
        # A refit of many scales costs as much as a pass; it follows those that moved something.
        if moved > state.codes.numel() * _REFIT_AFTER:
            refit()
            stale = False
        if not moved:
            break
    if stale:
        refit()
