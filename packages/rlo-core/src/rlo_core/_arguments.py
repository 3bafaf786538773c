"""Arguments are checked once, at the public function, with errors that say what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from rlo_core._compat import FakeTensor, assert_async, is_transformed


class TensorError(ValueError, RuntimeError):
    """A tensor of the wrong shape or on the wrong device: torch raises either of the two."""


class TensorTypeError(TypeError, RuntimeError):
    """A tensor of the wrong dtype, for which torch raises RuntimeError."""


REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for a label outside [0, classes).

    On the CPU only: elsewhere it would wait for the device, where a device-side assertion speaks.
    Skipped while compiling, under torch.func and for fake tensors: there are no values to read.
    """
    if target.device.type != "cpu" or target.numel() == 0 or torch.compiler.is_compiling():
        return
    if is_transformed(target) or isinstance(target, FakeTensor):
        return
    low, high = torch.aminmax(target)
    if low >= 0 and high < classes:
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(
            f"target must be in [0, {classes}) or ignore_index {ignore_index}, got {int(wrong[0])}"
        )


def assert_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Stop the device on a label outside [0, classes), without waiting for it.

    As torch's own cross entropy does: the next call that waits raises "device-side assert
    triggered", and the message below is on standard error.
    """
    if target.device.type != "cuda" or target.numel() == 0:
        return
    known = ((target >= 0) & (target < classes)) | (target == ignore_index)
    assert_async(known.all(), f"target must be in [0, {classes}) or ignore_index {ignore_index}")


def check_classes(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Check the arguments of a classification loss by the contract of torch's cross entropy."""
    check_reduction(reduction)
    check_smoothing(label_smoothing)
    if not logits.is_floating_point():
        raise TensorTypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0:
        raise TensorError("logits must have shape (C), (N, C) or (N, C, d1, ..., dK), got ()")
    if target.device != logits.device:
        raise TensorError(
            f"target must be on the device of logits, {logits.device}, got {target.device}"
        )
    shape = tuple(logits.shape)
    classes = shape[0] if len(shape) == 1 else shape[1]
    if target.is_floating_point():
        if tuple(target.shape) != shape:
            raise TensorError(
                f"probability target must have the shape of logits, {shape}, got "
                f"{tuple(target.shape)}; class indices must be int64, not {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index does not apply to probability targets, got {ignore_index}"
            )
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            raise TensorTypeError(
                f"target must be int64 class indices or floating probabilities, got {target.dtype}"
            )
        expected = shape[:1] + shape[2:] if len(shape) > 1 else ()
        if tuple(target.shape) != expected:
            raise TensorError(
                f"target must have shape {expected} for logits of shape {shape}, got "
                f"{tuple(target.shape)}"
            )
        check_labels(target, classes, ignore_index)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise TensorError(f"weight must have shape ({classes},), got {tuple(weight.shape)}")


def check_binary(logits: Tensor, target: Tensor, reduction: str) -> None:
    """Check the arguments of a binary loss."""
    check_reduction(reduction)
    if not logits.is_floating_point():
        raise TensorTypeError(f"logits must be floating point, got {logits.dtype}")
    if target.shape != logits.shape:
        raise TensorError(
            f"target must have shape {tuple(logits.shape)} like logits, got {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise TensorError(
            f"target must be on the device of logits, {logits.device}, got {target.device}"
        )
