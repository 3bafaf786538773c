r"""`compat="quip"`: the codes of the authors' program, faults included, for comparison only.

What differs from `methods.py`: weights are clipped to the grid before rounding, so feedback never
sees the clipping; one scale of 2.4 rms for the matrix (grid `b`, here symmetric and half-integer)
or a min/max range per row (grid `a`, here asymmetric with an integer zero); greedy steps leave the
grid and are clamped after a whole pass, without refreshing the error; the lazy form of ldlq runs no
pass. The arithmetic is blocked all the same: the codes are those of the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.rounding.admm import bounded_feedback
from rlo_gptq.rounding.feedback import factor, round_with_feedback
from rlo_gptq.rounding.greedy import Rounding, greedy_pass
from rlo_gptq.rounding.grids import ScalarGrid, stored
from rlo_gptq.rounding.methods import Rounded
from rlo_gptq.rounding.random_streams import random_uniforms
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.settings import LayerSettings

# The authors' multiplier of the root mean square, at every bit width.
RMS_MULTIPLIER = 2.4
_NOISE_STREAM = 64


@dataclass
class Prepared:
    """Weight (m, d), Hessian (d, d) and input scale (d,) after the authors' preprocessing."""

    weight: Tensor
    hessian: Tensor
    input_scale: Tensor | None


def prepare(
    weight: Tensor, hessian: Tensor, transform: Transform, settings: LayerSettings
) -> Prepared:
    """Rescale, rotate and damp in the authors' order; dead columns are set to zero."""
    W, H, input_scale = weight, hessian, None
    if settings.rescale:
        H = H / H.abs().max()
        moment, energy = H.diagonal().clamp(min=1e-8), W.square().sum(0).clamp(min=1e-8)
        input_scale = stored((energy / moment).sqrt().sqrt(), settings.scale_dtype)
        W, H = W / input_scale, H * input_scale * input_scale[:, None]
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    if transform.kind != "none":
        H = H * (len(H) / (H.trace() + 1e-8)) + 1e-2 * eye
        W, H = transform.rotate_weight(W), transform.rotate_hessian(H)
    if settings.percdamp:
        dead = H.diagonal() == 0
        H = H + torch.diag(dead.to(H.dtype))
        W = W.masked_fill(dead, 0.0)
        H = H + settings.percdamp * H.diagonal().mean() * eye
    return Prepared(W, H, input_scale)


def quip_round(weight: Tensor, hessian: Tensor, settings: LayerSettings, *, seed: int) -> Rounded:
    """Round a transposed weight (d, m), prepared, as the authors' program does.

    Raises:
        ValueError: the authors' program fails or hangs for these settings too.
    """
    grid = _grid(weight, settings)
    if settings.method == "nearest":
        return Rounded(grid.round_all(weight), grid)
    if settings.method == "gptq":
        order = torch.arange(len(weight), device=weight.device)
        codes, _ = round_with_feedback(weight, factor(hessian).feedback, grid, order)
        return Rounded(codes, grid)
    x = _clipped(weight, grid)
    return Rounded(_vector_balance(x, hessian, settings, seed), grid)


def _grid(weight: Tensor, settings: LayerSettings) -> ScalarGrid:
    if settings.integer_zero:
        return _row_grid(weight, settings)
    if settings.method == "gptq":
        return _ColumnGrid(len(weight), weight.shape[1], settings, weight)
    return _global_grid(weight, settings)


def _vector_balance(x: Tensor, hessian: Tensor, settings: LayerSettings, seed: int) -> Tensor:
    """Round x (d, m), in code units inside the grid, with one of the four balancing methods."""
    d, m = x.shape
    passes = _passes(settings)
    order = torch.arange(d, device=x.device).flip(0)
    if settings.method != "ldlq":
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    own = torch.argsort(order)
    x, H = x[order], hessian[order][:, order]
    inside, everywhere = _CodeGrid(settings.bits, d, m, x), _CodeGrid(None, d, m, x)
    noise = None
    if settings.unbiased:
        noise = random_uniforms(seed, _NOISE_STREAM, d * m).view(d, m).to(x) - 0.5
    if settings.method == "allbal":
        codes = x.clone()
    else:
        admm = settings.method == "ldlbal_admm"
        feedback = bounded_feedback(H, tolerance=0.0) if admm else factor(H).feedback
        codes, _ = round_with_feedback(x, feedback, inside, order, noise=noise)
    state = Rounding(x, H, codes, codes.clone(), H @ (codes - x), order)
    top = float(2**settings.bits - 1)
    for _ in range(passes):
        before = state.codes.clone()
        greedy_pass(state, inside if settings.method == "ldlbal_admm" else everywhere)
        # Clamped without refreshing the gradient: the next pass believes the unclamped errors.
        state.codes.clamp_(0, top)
        state.values.copy_(state.codes)
        if torch.equal(before, state.codes):
            break
    return state.codes[own]


def _passes(settings: LayerSettings) -> int:
    # With lazy_batch the passes arrive as the block size, and False as the number of passes.
    lazy = settings.lazy_batch and settings.method in ("ldlq", "ldlqRG")
    return 0 if lazy else settings.npasses or 0


def _clipped(weight: Tensor, grid: ScalarGrid) -> Tensor:
    return (weight / grid.scales[grid.group] + grid.zeros[grid.group]).clamp_(0, grid.top)


def _global_grid(weight: Tensor, settings: LayerSettings) -> ScalarGrid:
    """Return grid `b`: levels evenly over -2.4 rms to 2.4 rms of the whole matrix."""
    top = float(2**settings.bits - 1)
    half = RMS_MULTIPLIER * weight.square().mean().sqrt() + 1e-16
    scale = stored(2 * half / top, settings.scale_dtype).expand(weight.shape[1])
    return _uniform_grid(scale, torch.full_like(scale, top / 2), settings, len(weight))


def _row_grid(weight: Tensor, settings: LayerSettings) -> ScalarGrid:
    """Return grid `a`: from minimum to maximum of each row, zero included, with an integer zero."""
    top = float(2**settings.bits - 1)
    low, high = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    scale = stored((high - low) / top, settings.scale_dtype)
    return _uniform_grid(scale, (-low / scale).round(), settings, len(weight))


def _uniform_grid(scale: Tensor, zero: Tensor, settings: LayerSettings, d: int) -> ScalarGrid:
    group = torch.zeros(d, dtype=torch.int64, device=scale.device)
    return ScalarGrid(scale[None].contiguous(), zero[None].contiguous(), settings.bits, group)


class _CodeGrid(ScalarGrid):
    """The integers, up to 2^bits - 1 from 0 or, with bits None, all of them."""

    def __init__(self, bits: int | None, d: int, m: int, like: Tensor) -> None:
        ones = torch.ones(1, m, dtype=like.dtype, device=like.device)
        group = torch.zeros(d, dtype=torch.int64, device=like.device)
        super().__init__(ones, torch.zeros_like(ones), bits or 8, group)
        self.bounded = bits is not None

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the nearest integers of column j."""
        torch.round(x, out=code)
        if self.bounded:
            code.clamp_(0, self.top)
        value.copy_(code)


class _ColumnGrid(ScalarGrid):
    """Grid `b` inside GPTQ: the scale is taken anew from every column as it is rounded."""

    def __init__(self, d: int, m: int, settings: LayerSettings, like: Tensor) -> None:
        scales = torch.zeros(d, m, dtype=like.dtype, device=like.device)
        half = torch.full_like(scales, (2**settings.bits - 1) / 2)
        super().__init__(scales, half, settings.bits, torch.arange(d, device=like.device))
        self.scale_dtype = settings.scale_dtype

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Set the scale of column j from x, then round."""
        width = RMS_MULTIPLIER * x.square().mean().sqrt() + 1e-16
        scale = stored(2 * width / self.top, self.scale_dtype)
        self.scales[j] = scale
        torch.div(x, scale, out=code).add_(self.top / 2).round_().clamp_(0, self.top)
        torch.sub(code, self.top / 2, out=value)
        value.mul_(scale)
