"""`--rlo-check`: what the slot does, on the first real batch, and then the run ends."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def check_first_batch(ours: nn.Module, host: nn.Module, spec: str, found: str) -> nn.Module:
    """Make the first call of a criterion print what it does beside the host's own, and exit with 0.

    The weight of a sample is what its gradient is multiplied by: the slope of the link at its cross
    entropy, measured as the projection of our gradient on the host's.

    Args:
        ours: The criterion that is in the slot.
        host: The one that was in it.
        spec: The loss.
        found: Where the slot is.

    Returns:
        `ours`.
    """

    def look(logits: Tensor, target: Tensor) -> Tensor:
        print(report(ours, forward, host, spec, found, logits, target), flush=True)
        raise SystemExit(0)

    forward = ours.forward
    ours.forward = torch.compiler.disable(look)  # type: ignore
    return ours


def kept(host: nn.Module) -> nn.Module:
    """Return a copy of the host's criterion, which may have its inside replaced."""
    return copy.deepcopy(host)


def report(
    ours: nn.Module,
    forward: Any,
    host: nn.Module,
    spec: str,
    found: str,
    logits: Tensor,
    target: Tensor,
) -> str:
    """Return the lines of the check."""
    values, grads = [], []
    for criterion in (host, forward):
        z = logits.detach().float().requires_grad_()
        with torch.enable_grad():
            value = criterion(z, target)
            (grad,) = torch.autograd.grad(value, z)
        values.append(float(value.detach()))
        grads.append(grad.flatten(1))
    scale = (grads[0] * grads[0]).sum(1)
    weights = (grads[0] * grads[1]).sum(1) / scale.clamp_min(torch.finfo(torch.float32).tiny)
    effective = float(weights.sum() ** 2 / (weights**2).sum().clamp_min(1e-38))
    shown = " ".join(f"{weight:.4g}" for weight in weights[:16].tolist())
    more = "" if len(weights) <= 16 else f" ... ({len(weights)} in all)"
    lines = [
        f"slot: {found}",
        f"criterion: {spec} ({type(ours).__name__}) in place of {type(host).__name__}",
        f"batch: logits {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}, "
        f"targets {tuple(target.shape)} {str(target.dtype).removeprefix('torch.')}",
        f"loss: {values[0]:.6g} before, {values[1]:.6g} now",
        f"sample weights: {shown}{more}",
        f"sample weights: min {float(weights.min()):.4g}, mean {float(weights.mean()):.4g}, max "
        f"{float(weights.max()):.4g}; as many as {effective:.1f} of {len(weights)} alike",
    ]
    return "\n".join(f"rlo-check: {line}" for line in lines)
