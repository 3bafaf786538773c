"""The arguments of a fused linear loss, checked once, at the public function."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rlo_core._arguments import (
    TensorError,
    TensorTypeError,
    assert_labels,
    check_labels,
    check_reduction,
    check_smoothing,
)
from rlo_core.linear.plan import autocast_enabled
from rlo_core.links import Link

Impl = Literal["auto", "chunked", "two-pass", "torch", "cce"]
IMPLS: tuple[str, ...] = get_args(Impl)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    link: Link,
    *,
    bias: Tensor | None,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    token_weight: Tensor | None,
    reduction: str,
    softcap: float | None,
    shift: bool,
    impl: str,
    memory_budget: int | None,
) -> None:
    """Raise ValueError, TypeError or IndexError, saying what was expected and what was got."""
    check_reduction(reduction)
    check_smoothing(label_smoothing)
    if impl not in IMPLS:
        raise ValueError(
            f"impl must be 'auto', 'chunked', 'two-pass', 'torch' or 'cce', got {impl!r}"
        )
    if not isinstance(link, Link):
        raise TypeError(f"link must be a rlo_core.links.Link, got {type(link).__name__}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    if not hidden.is_floating_point():
        raise TensorTypeError(f"hidden must be floating point, got {hidden.dtype}")
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise TensorError(
            "hidden must have shape (..., D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if tuple(target.shape) != tuple(hidden.shape[:-1]):
        raise TensorError(
            f"target must have shape {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise TensorTypeError(f"target must be int64 class indices, got {target.dtype}")
    if shift and target.dim() == 0:
        raise TensorError("shift needs a token dimension: target must have shape (..., T), got ()")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise TensorError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if token_weight is not None and tuple(token_weight.shape) != tuple(target.shape):
        raise TensorError(
            f"token_weight must have shape {tuple(target.shape)} like target, got "
            f"{tuple(token_weight.shape)}"
        )
    named = {"weight": weight, "target": target, "bias": bias, "token_weight": token_weight}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != hidden.device:
            raise TensorError(
                f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}"
            )
    if not autocast_enabled(hidden.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TensorTypeError(
                    f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}; "
                    "cast one of them or use torch.autocast"
                )
    check_labels(target, classes, ignore_index)
    assert_labels(target, classes, ignore_index)
