r"""One layer: weight and Hessian in, codes out, with the true error in the original basis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlo_gptq.grids import column_groups, stored
from rlo_gptq.incoherence import Transform
from rlo_gptq.rounding.methods import round_matrix
from rlo_gptq.rounding.quip import prepare, quip_round
from rlo_gptq.rounding.trellis import decode
from rlo_gptq.settings import GridKind, LayerSettings


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
        grid: `scalar` or `trellis`; says how codes become values.
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
        group = column_groups(self.codes.shape[1], self.group_size).to(self.codes.device)
        if self.grid == "trellis":
            unit = decode(self.codes.T).T
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
    error = weight - rounded
    of_error = ((error @ hessian) * error).sum(dtype=torch.float64)
    of_weight = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(of_error / of_weight) if of_weight > 0 else 0.0


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
    H = (H + H.T) / 2
    mean = H.diagonal().mean()
    H = H / mean if mean > 0 else torch.eye(len(H), device=H.device)
    transform = Transform(
        settings.incoherence,
        settings.incoherence_sides,
        seed,
        W.shape[1],
        W.shape[0],
        settings.proj_extra,
    )
    if settings.compat == "quip":
        ready = prepare(W, H, transform, settings)
        group_size = -1 if settings.method != "gptq" or settings.integer_zero else 1
        rounded = quip_round(ready.weight.T.contiguous(), ready.hessian, settings, seed=seed)
        input_scale = ready.input_scale
    else:
        input_scale, turned, moment = _prepare(W, H, transform, settings)
        group_size = settings.group_size
        rounded = round_matrix(turned.T.contiguous(), moment, settings, seed=seed)
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
    return replace(layer, proxy=proxy_loss(W, layer.dequantize(), H))


def _prepare(
    W: Tensor, H: Tensor, transform: Transform, settings: LayerSettings
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the input scale, and weight and Hessian rescaled, rotated and damped."""
    input_scale = _rescale(W, H, settings) if settings.rescale else None
    if input_scale is not None:
        W, H = W / input_scale, H * input_scale * input_scale[:, None]
    turned, moment = transform.rotate_weight(W), transform.rotate_hessian(H)
    damping = settings.percdamp * moment.diagonal().mean()
    return input_scale, turned, moment + damping * torch.eye(len(moment), device=moment.device)


def _rescale(W: Tensor, H: Tensor, settings: LayerSettings) -> Tensor:
    r"""Return :math:`i_j = ((W^T W)_{jj} / H_{jj})^{1/4}`, the inverse of QuIP's column scale."""
    energy = W.square().sum(0).clamp(min=1e-8)
    moment = H.diagonal().clamp(min=1e-8)
    scale = (energy / moment).sqrt().sqrt()
    return stored(scale / scale.mean(), settings.scale_dtype).clamp(min=1e-4)


def _check(weight: Tensor, hessian: Tensor) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (m, d), got {tuple(weight.shape)}")
    d = weight.shape[1]
    if hessian.shape != (d, d):
        raise ValueError(
            f"hessian must have shape ({d}, {d}) for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(hessian.shape)}"
        )
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got nan or inf")
    if (hessian.diagonal() < 0).any():
        raise ValueError("hessian must have a diagonal of at least 0, got a negative entry")
