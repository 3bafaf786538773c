"""The CUDA row kernel: a tile of logits becomes ce and softmax minus one-hot, in place.

One program per row reads its logits twice: once for the maximum and the sum (online), once to write
the gradient over them. The link is not in here: its slope is a number per row, and stays off the
tile.
Tested under TRITON_INTERPRET=1 on a CPU; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Logits per step of a program."""
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _bounded(z, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Softcap * tanh(z / softcap); tanh(x) = 2 sigmoid(2x) - 1 needs no libdevice."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    tile,
    stride,
    target,
    ce,
    columns,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * stride
    y = tl.load(target + row)
    lanes = tl.arange(0, BLOCK)
    if y == ignore_index:
        tl.store(ce + row, 0.0)
        if WITH_GRADIENT:
            for start in range(0, columns, BLOCK):
                at = start + lanes
                tl.store(tile + at, tl.zeros([BLOCK], tl.float32), mask=at < columns)
        return
    top = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + lanes
        z = tl.load(tile + at, mask=at < columns, other=0.0)
        z = tl.where(at < columns, _bounded(z, softcap, HAS_SOFTCAP), -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    at_target = _bounded(tl.load(tile + y), softcap, HAS_SOFTCAP)
    loss = tl.log(total) + (top - at_target)
    tl.store(ce + row, loss)
    if WITH_GRADIENT:
        # p - 1 = expm1(-ce), by its series where 1 - p would lose its digits
        series = -loss * (1.0 - loss * (0.5 - loss * (1.0 / 6.0 - loss / 24.0)))
        miss = tl.where(loss < 0.05, series, tl.exp(-loss) - 1.0)
        for start in range(0, columns, BLOCK):
            at = start + lanes
            z = tl.load(tile + at, mask=at < columns, other=0.0)
            z = _bounded(z, softcap, HAS_SOFTCAP)
            g = tl.where(at == y, miss, tl.exp(z - top) / total)
            if HAS_SOFTCAP:
                g *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(tile + at, g, mask=at < columns)


def cross_entropy_rows(
    tile: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    with_gradient: bool,
) -> Tensor:
    """Return ce of each row, (R), float32, 0 where ignored; turn the tile into softmax - onehot.

    Args:
        tile: Raw logits, (R, V), float32 or half, rows contiguous; overwritten if `with_gradient`.
        target: int64, (R). A row with `ignore_index` becomes zeros.
        ignore_index: See `target`.
        softcap: Logits are `softcap * tanh(logits / softcap)`; None for as they are.
        with_gradient: False leaves the tile as it is.
    """
    rows, columns = tile.shape
    ce = torch.empty(rows, dtype=torch.float32, device=tile.device)
    if rows:
        with torch.cuda.device_of(tile):  # type: ignore[no-untyped-call]
            _rows_kernel[(rows,)](
                tile,
                tile.stride(0),
                target.contiguous(),
                ce,
                columns,
                1.0 if softcap is None else softcap,
                ignore_index,
                HAS_SOFTCAP=softcap is not None,
                WITH_GRADIENT=with_gradient,
                BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
                num_warps=WARPS,
            )
    return ce
