r"""One layer: weight and Hessian in, codes out, with the true error in the original basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlo_gptq.rounding.grids import column_groups, nearest_stored
from rlo_gptq.rounding.methods import round_in_parts
from rlo_gptq.rounding.quip import prepare, quip_round
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.rounding.trellis import decode, trellis_of
from rlo_gptq.settings import GridKind, LayerSettings

LOSS_ROWS = 256
"""Rows of a matrix whose temporaries exist at one time."""


@dataclass
class QuantizedLayer:
    r"""The codes of a layer and all that is needed to read them.

    With :math:`W' = U (W \oslash i) V^T` the matrix that was rounded, i the `input_scale`:
    :math:`W x = U^T W' V (x \odot i)`.

    Args:
        codes: (m, d) uint8, unpacked, columns in the input order of the transformed basis.
        scales: (m, groups) float32, already rounded to the type they are to be stored in.
        zeros: (m, groups) float32; value = scales * (codes - zeros); may be fractional.
        group_size: columns per group, -1 or 0 for one group.
        bits: bits of a code.
        input_scale: (d,) float32 or None; an input is multiplied by it before the rotation.
        transform: the rotations, as a seed.
        proxy: tr((W - What) H (W - What)^T) / tr(W H W^T) in the original basis, undamped.
        grid: `scalar` or a trellis; says how codes become values.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    bits: int
    input_scale: Tensor | None
    transform: Transform
    proxy: float
    grid: GridKind = "scalar"

    def values(self) -> Tensor:
        """Return the rounded matrix (m, d), float32, in the transformed basis."""
        group = column_groups(self.codes.shape[1], self.group_size, self.codes.device)
        trellis = trellis_of(self.grid, self.bits)
        if trellis is not None:
            unit = decode(self.codes.T, trellis).T
        else:
            unit = self.codes.to(torch.float32) - self.zeros[:, group]
        return self.scales[:, group] * unit

    def dequantize(self) -> Tensor:
        """Return What (m, d), float32, in the original basis."""
        weight = self.transform.restore_weight(self.values())
        return weight if self.input_scale is None else weight * self.input_scale


def proxy_loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return tr((W - What) H (W - What)^T) / tr(W H W^T); 0 where W H W^T is 0.

    Args:
        weight: W (m, d).
        rounded: What (m, d).
        hessian: H (d, d), undamped.
    """
    return _ratio(_quadratic(weight - rounded, hessian), _quadratic(weight, hessian))


def _ratio(of_error: Tensor, of_weight: Tensor) -> float:
    """Return the quotient of two numbers, 0 for a weight of no size; waits for the device."""
    return float(torch.where(of_weight > 0, of_error / of_weight, 0.0))


def quantize_layer(
    weight: Tensor, hessian: Tensor, settings: LayerSettings, *, seed: int
) -> QuantizedLayer:
    """Round one weight matrix against the second moment of its inputs.

    A pure function: the same tensors, settings and seed give the same bits.

    Args:
        weight: W (m, d), any floating type.
        hessian: H (d, d), second moment of the inputs, positive semi-definite; need not be full
            rank. Its scale does not matter.
        settings: the method and its options.
        seed: of the rotations and of stochastic rounding.

    Raises:
        ValueError: shapes do not match, or a value is not finite, or H is indefinite.
    """
    _check(weight, hessian)
    W = weight.detach().to(torch.float32)
    H = hessian.detach().to(torch.float32)
    transform = Transform(
        settings.incoherence,
        settings.incoherence_sides,
        seed,
        W.shape[1],
        W.shape[0],
        settings.proj_extra,
    )
    if settings.compat == "quip":
        ready = prepare(W, normalised(H), transform, settings)
        group_size = -1 if settings.method != "gptq" or settings.integer_zero else 1
        rounded = quip_round(ready.weight.T.contiguous(), ready.hessian, settings, seed=seed)
        input_scale = ready.input_scale
    else:
        moment = normalised(H)
        input_scale = _rescale(W, moment, settings) if settings.rescale else None
        if input_scale is not None:
            moment.mul_(input_scale).mul_(input_scale[:, None])
        transform.rotate_hessian_(moment)
        moment.diagonal().add_(settings.percdamp * moment.diagonal().mean())
        group_size = settings.group_size
        rounded = round_in_parts(
            _rotated_weight(W, input_scale, transform), len(W), moment, settings, seed=seed
        )
        del moment
    layer = QuantizedLayer(
        codes=rounded.codes.T.to(torch.uint8).contiguous(),
        scales=rounded.grid.scales.T.contiguous(),
        zeros=rounded.grid.zeros.T.contiguous(),
        group_size=group_size,
        bits=settings.bits,
        input_scale=input_scale,
        transform=transform,
        proxy=0.0,
        grid=settings.grid,
    )
    return replace(layer, proxy=_loss_of(layer, W, H))


def normalised(hessian: Tensor) -> Tensor:
    """Return the symmetric part of H divided by its mean diagonal; the identity for H = 0."""
    mean = hessian.diagonal().mean()
    result = torch.empty_like(hessian)
    for strip in strips(hessian):
        torch.add(hessian[strip], hessian[:, strip].T, out=result[strip])
    result.mul_(torch.where(mean > 0, 0.5 / mean, 0.0))
    result.diagonal().add_(torch.where(mean > 0, 0.0, 1.0))
    return result


def strips(x: Tensor) -> list[slice]:
    """Return slices of the rows of x whose temporaries may exist at one time."""
    size = LOSS_ROWS * (16 if x.is_cuda else 1)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _rotated_weight(
    W: Tensor, input_scale: Tensor | None, transform: Transform
) -> Callable[[slice], Tensor]:
    """Return a function from a slice of outputs to (W / i) V^T of them, transposed, (d, some)."""

    def rotated(rows: Tensor) -> Tensor:
        return transform.apply_input(rows if input_scale is None else rows / input_scale)

    if transform.output.kind == "none":
        return lambda part: rotated(W[part]).T
    whole = transform.output.apply(rotated(W).T)  # rotated outputs depend on all of them
    return lambda part: whole[:, part]


def _loss_of(layer: QuantizedLayer, W: Tensor, H: Tensor) -> float:
    """Return the proxy loss of a layer, some outputs at a time where they do not mix."""
    if layer.grid != "scalar" or layer.transform.output.kind != "none":
        return proxy_loss(W, layer.dequantize(), H)
    of_error = of_weight = torch.zeros((), dtype=torch.float64, device=W.device)
    for rows in strips(W):
        part = replace(
            layer, codes=layer.codes[rows], scales=layer.scales[rows], zeros=layer.zeros[rows]
        )
        of_error = of_error + _quadratic(W[rows] - part.dequantize(), H)
        of_weight = of_weight + _quadratic(W[rows], H)
    return _ratio(of_error, of_weight)


def _quadratic(x: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(x H x^T), float64 ()."""
    return (x @ hessian).mul_(x).sum(dtype=torch.float64)


def _rescale(W: Tensor, H: Tensor, settings: LayerSettings) -> Tensor:
    r"""Return :math:`i_j = ((W^T W)_{jj} / H_{jj})^{1/4}`, the inverse of QuIP's column scale."""
    energy = torch.linalg.vector_norm(W, dim=0).square().clamp(min=1e-8)
    moment = H.diagonal().clamp(min=1e-8)
    scale = (energy / moment).sqrt().sqrt()
    # A mean of 1 over d columns keeps it within half precision.
    return nearest_stored(scale / scale.mean(), settings.scale_dtype).clamp(min=1e-4)


def _check(weight: Tensor, hessian: Tensor) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (m, d), got {tuple(weight.shape)}")
    d = weight.shape[1]
    if hessian.shape != (d, d):
        raise ValueError(
            f"hessian must have shape ({d}, {d}) for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(hessian.shape)}"
        )
    finite = [torch.isfinite(tensor).all() for tensor in (weight, hessian)]
    # One number for all, because each that is asked for stops a GPU.
    checks = torch.stack([*finite, (hessian.diagonal() >= 0).all()])
    wrong = int(sum(~checks[i] * 2**i for i in range(3)))
    for name, flag in (("weight", 1), ("hessian", 2)):
        if wrong & flag:
            raise ValueError(f"{name} must be finite, got nan or inf")
    if wrong:
        raise ValueError("hessian must have a diagonal of at least 0, got a negative entry")
