"""Which implementation, in how large chunks, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_core._compat import is_transformed
from rlo_core.linear.link_codes import is_built_in, slope_is_bounded
from rlo_core.links import Link

CPU_ROW_BYTES = 2048
"""Tile bytes per class on a CPU: 512 rows of float32, 1024 of bfloat16. With fewer rows the weight
gradient is streamed through the cache more often; more rows cost memory and gain nothing."""
CUDA_TILE_BYTES = 256 << 20
"""Least tile on a GPU; the default is a quarter of the weight where that is more."""
CLASSES = 8192
"""Classes per block of the two passes, at most: wide enough for a matrix product at full speed."""
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """What will run, and why; `str(plan)` is one line."""

    impl: str
    reason: str
    rows: int
    """Tokens whose logits exist at the same time."""
    tokens: int
    tile_bytes: int
    columns: int = 0
    """Classes whose logits exist at the same time, for the two passes; 0: all of them."""

    def __str__(self) -> str:
        what = f"{self.rows} of {self.tokens} tokens"
        if self.columns:
            what = f"{self.columns} classes"
        return (
            f"impl={self.impl!r}: {self.reason}; logits of {what} at a time, "
            f"{self.tile_bytes / 1e6:.1f} MB"
        )


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for a kind of device; never for one that has none, such as meta."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's, or that of `hidden`.

    float16 on a CPU is computed in float32: its products are 5 to 80 times slower than float32's.
    """
    kind = hidden.device.type
    dtype = hidden.dtype
    if dtype != torch.float64 and autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return torch.float32 if dtype == torch.float16 and kind == "cpu" else dtype


def chunk_rows(tokens: int, weight: Tensor, compute: torch.dtype, memory_budget: int | None) -> int:
    """Return the tokens per chunk: as many as the budget (bytes) holds logits of, at least one."""
    row_bytes = weight.shape[0] * compute.itemsize
    if memory_budget is not None:
        rows = memory_budget // max(row_bytes, 1)
    elif weight.device.type == "cpu":
        rows = CPU_ROW_BYTES // compute.itemsize
    else:
        tile = max(CUDA_TILE_BYTES, weight.numel() * compute.itemsize // 4)
        rows = tile // max(row_bytes, 1)
    if rows >= 256:
        rows -= rows % 128  # whole tiles of the matrix product
    return max(1, min(int(rows), max(tokens, 1)))


def block_columns(
    tokens: int, weight: Tensor, compute: torch.dtype, memory_budget: int | None
) -> int:
    """Return the classes per block of the two passes: as many as the budget holds logits of."""
    budget = memory_budget
    if budget is None:
        budget = CUDA_TILE_BYTES if weight.device.type != "cpu" else CPU_ROW_BYTES * CLASSES
    columns = budget // max(tokens * compute.itemsize, 1)
    if columns >= 256:
        columns -= columns % 128
    return max(1, min(int(columns), CLASSES, max(weight.shape[0], 1)))


def cce_installed() -> bool:
    """Whether the optional cut-cross-entropy package is there."""
    return importlib.util.find_spec("cut_cross_entropy") is not None


def plan_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    link: Link,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
    memory_budget: int | None = None,
) -> Plan:
    """Return what `link_linear_cross_entropy` would do with these arguments, and why."""
    return plan_of(
        hidden,
        weight,
        link,
        bias,
        label_smoothing=label_smoothing,
        reduction=reduction,
        impl=impl,
        memory_budget=memory_budget,
        sharded=False,
    )


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    link: Link,
    bias: Tensor | None,
    *,
    label_smoothing: float,
    reduction: str,
    impl: str,
    memory_budget: int | None,
    sharded: bool,
) -> Plan:
    """Return the plan for a weight that may be one rank's part of the vocabulary (`sharded`)."""
    tokens = hidden.shape[:-1].numel()
    compute = compute_dtype(hidden)
    rows = chunk_rows(tokens, weight, compute, memory_budget)
    reason = "asked for"
    if impl == "auto":
        found = None
        if not sharded:
            found = _by_other_means(hidden, weight, link, bias, label_smoothing, reduction, compute)
        impl, reason = found or _passes(weight, reduction, compute, one_chunk=rows >= tokens)
    columns = weight.shape[0]
    if impl == "torch":
        rows = tokens
    elif impl == "cce":
        rows = min(tokens, 128)
    elif impl == "two-pass":
        rows, columns = tokens, block_columns(tokens, weight, compute, memory_budget)
    size = rows * columns * compute.itemsize
    return Plan(impl, reason, rows, tokens, size, columns if impl == "two-pass" else 0)


def _under_transform(*tensors: Tensor) -> bool:
    return any(is_transformed(t) for t in tensors)


def _by_other_means(
    hidden: Tensor,
    weight: Tensor,
    link: Link,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    compute: torch.dtype,
) -> tuple[str, str] | None:
    """Torch's operations or cut-cross-entropy, where one of them is the better or only way."""
    if not torch.compiler.is_compiling() and _under_transform(hidden, weight):
        return "torch", "torch.func transforms need an implementation made of plain operations"
    if torch.compiler.is_compiling() and label_smoothing > 0 and not is_built_in(link):
        return "torch", "torch.compile cannot hand a link of your own to the chunked kernel"
    if (
        hidden.device.type == "cuda"
        and compute in HALF
        and bias is None
        and label_smoothing == 0.0
        and (reduction == "none" or slope_is_bounded(link))
        and cce_installed()
    ):
        if reduction == "none":
            return (
                "cce",
                "reduction='none' needs the logits twice, and cut-cross-entropy is installed",
            )
        return "cce", "cut-cross-entropy is installed, and the link's slope lets it filter blocks"
    return None


def _passes(
    weight: Tensor, reduction: str, compute: torch.dtype, *, one_chunk: bool
) -> tuple[str, str]:
    """Chunks of tokens or blocks of classes."""
    if weight.device.type != "cpu" and torch.is_grad_enabled() and weight.requires_grad:
        if compute in HALF:
            return "two-pass", "the weight's gradient is written once, in its own dtype"
        if not one_chunk:
            return "two-pass", "the weight's gradient is written once, not summed over chunks"
    if reduction == "none":
        return "chunked", "logits are computed per chunk, and again in the backward pass"
    return "chunked", "gradients are finished in the forward pass, chunk by chunk"
