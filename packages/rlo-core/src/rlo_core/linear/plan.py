"""Which implementation, in how large chunks, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_core.linear.link_codes import is_built_in
from rlo_core.links import Link

CPU_ROW_BYTES = 2048
"""Tile bytes per class on a CPU: 512 rows of float32, 1024 of bfloat16. With fewer rows the weight
gradient is streamed through the cache more often; more rows cost memory and gain nothing."""
CUDA_TILE_BYTES = 256 << 20
"""Least tile on a GPU; the default is a quarter of the weight where that is more."""


@dataclass(frozen=True)
class Plan:
    """What will run, and why; `str(plan)` is one line."""

    impl: str
    reason: str
    rows: int
    """Tokens whose logits exist at the same time."""
    tokens: int
    tile_bytes: int

    def __str__(self) -> str:
        return (
            f"impl={self.impl!r}: {self.reason}; logits of {self.rows} of {self.tokens} tokens at "
            f"a time, {self.tile_bytes / 1e6:.1f} MB"
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
    tokens = hidden.shape[:-1].numel()
    compute = compute_dtype(hidden)
    rows = chunk_rows(tokens, weight, compute, memory_budget)
    reason = "asked for"
    if impl == "auto":
        impl, reason = _choose(hidden, weight, link, bias, label_smoothing, reduction, compute)
    if impl == "torch":
        rows = tokens
    elif impl == "cce":
        rows = min(tokens, 128)
    return Plan(impl, reason, rows, tokens, rows * weight.shape[0] * compute.itemsize)


def _under_transform(*tensors: Tensor) -> bool:
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _choose(
    hidden: Tensor,
    weight: Tensor,
    link: Link,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    compute: torch.dtype,
) -> tuple[str, str]:
    if not torch.compiler.is_compiling() and _under_transform(hidden, weight):
        return "torch", "torch.func transforms need an implementation made of plain operations"
    if torch.compiler.is_compiling() and label_smoothing > 0 and not is_built_in(link):
        return "torch", "torch.compile cannot hand a link of your own to the chunked kernel"
    if (
        reduction == "none"
        and hidden.device.type == "cuda"
        and compute in (torch.float16, torch.bfloat16)
        and bias is None
        and label_smoothing == 0.0
        and cce_installed()
    ):
        return "cce", "reduction='none' needs the logits twice, and cut-cross-entropy is installed"
    if reduction == "none":
        return "chunked", "logits are computed per chunk, and again in the backward pass"
    return "chunked", "gradients are finished in the forward pass, chunk by chunk"
