"""The CUDA kernels of a tile of logits: statistics of its rows, and its gradient in place.

A tile holds the logits of some tokens for all classes, or for a block of them; what a row needs to
know of the other blocks is in its numbers. One program per row. The link's slope is one number per
row and stays out, but for label smoothing, where the link acts on every logit.
A label that is no class is never used as an address: its row comes out as NaN.
Tested under TRITON_INTERPRET=1 on a CPU and compiled ahead of time; not yet measured on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlo_core.linear.link_codes import Exponential
from rlo_core.links import CONVEX_LINEAR_FROM

BLOCK = 8192
"""Logits per step of a program."""
LANE = 512
"""Logits of a warp per step: 16 a thread, two vectors of 16 bytes in half precision."""
LINEAR_FROM = tl.constexpr(CONVEX_LINEAR_FROM)
TANGENT = tl.constexpr(math.exp(CONVEX_LINEAR_FROM))


@triton.jit  # type: ignore[untyped-decorator]
def _bounded(z, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Softcap * tanh(z / softcap); tanh(x) = 2 sigmoid(2x) - 1 needs no libdevice."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _expm1(x):  # type: ignore[no-untyped-def]
    """E^x - 1, by its series where the difference would lose its digits."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0)))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def]
    tile,
    stride,
    target,
    state,
    rows,
    columns,
    first,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    if y == ignore_index:
        return
    tile += row * stride
    state += row
    lanes = tl.arange(0, BLOCK)
    top = tl.load(state)
    total = tl.load(state + rows)
    added = 0.0
    for start in range(0, columns, BLOCK):
        at = start + lanes
        z = tl.load(tile + at, mask=at < columns, other=0.0)
        z = _bounded(z, softcap, HAS_SOFTCAP)
        if WITH_SUM:
            added += tl.sum(tl.where(at < columns, z, 0.0), axis=0)
        z = tl.where(at < columns, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        # All -inf so far: -inf - -inf is NaN, -inf - 0 is not.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
        top = higher
    tl.store(state, top)
    tl.store(state + rows, total)
    if WITH_SUM:
        tl.store(state + 3 * rows, tl.load(state + 3 * rows) + added)
    place = y - first
    if (place >= 0) & (place < columns):
        tl.store(state + 2 * rows, _bounded(tl.load(tile + place), softcap, HAS_SOFTCAP))


@triton.jit  # type: ignore[untyped-decorator]
def _spread_kernel(  # type: ignore[no-untyped-def]
    tile,
    stride,
    target,
    numbers,
    sums,
    rows,
    columns,
    softcap,
    linear,
    factor,
    rate,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(target + row) == ignore_index:
        return
    tile += row * stride
    numbers += row
    sums += row
    top, log_total = tl.load(numbers), tl.load(numbers + rows)
    lanes = tl.arange(0, BLOCK)
    value, slope = 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + lanes
        z = _bounded(tl.load(tile + at, mask=at < columns, other=0.0), softcap, HAS_SOFTCAP)
        each = log_total + (top - z)
        x = -rate * each
        near = tl.minimum(x, LINEAR_FROM)
        beyond = (x - near) * TANGENT
        values = linear * each + factor * (_expm1(near) + beyond)
        slopes = linear - rate * factor * tl.exp(near)
        value += tl.sum(tl.where(at < columns, values, 0.0), axis=0)
        slope += tl.sum(tl.where(at < columns, slopes, 0.0), axis=0)
    tl.store(sums, tl.load(sums) + value)
    tl.store(sums + rows, tl.load(sums + rows) + slope)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    tile,
    stride,
    target,
    numbers,
    rows,
    columns,
    first,
    softcap,
    linear,
    factor,
    rate,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * stride
    numbers += row
    y = tl.load(target + row)
    lanes = tl.arange(0, BLOCK)
    if y == ignore_index:
        for start in range(0, columns, BLOCK):
            at = start + lanes
            tl.store(tile + at, tl.zeros([BLOCK], tl.float32), mask=at < columns)
        return
    top, log_total = tl.load(numbers), tl.load(numbers + rows)
    miss = _expm1(-tl.load(numbers + 2 * rows))
    whole = tl.load(numbers + 3 * rows) if SCALED else 1.0
    off = tl.load(numbers + 4 * rows) if SMOOTHED else 0.0
    spread = tl.load(numbers + 5 * rows) if SMOOTHED else 0.0
    for start in range(0, columns, BLOCK):
        at = start + lanes
        z = _bounded(tl.load(tile + at, mask=at < columns, other=0.0), softcap, HAS_SOFTCAP)
        each = log_total + (top - z)
        p = tl.exp(-each)
        if SMOOTHED:
            slopes = linear - rate * factor * tl.exp(tl.minimum(-rate * each, LINEAR_FROM))
            g = whole * p - spread * slopes - tl.where(at + first == y, off, 0.0)
        else:
            g = whole * tl.where(at + first == y, miss, p)  # p - 1, exact where it would round
        if HAS_SOFTCAP:
            g *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(tile + at, g, mask=at < columns)


def _launch(kernel: Any, tile: Tensor, target: Tensor, *arguments: Any, **constants: Any) -> None:
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(tile):  # type: ignore[no-untyped-call]
        kernel[(rows,)](
            tile,
            tile.stride(0),
            target,
            *arguments,
            **constants,
            BLOCK=block,
            num_warps=max(1, min(16, block // LANE)),
        )


def statistics_rows(
    tile: Tensor,
    target: Tensor,
    state: Tensor,
    *,
    first: int,
    softcap: float | None,
    ignore_index: int,
    with_sum: bool,
) -> None:
    """Take a tile's logits into the state of its rows; see `blocks.statistics`.

    Args:
        tile: Raw logits, (R, C), float32 or half, rows contiguous.
        target: int64, (R), contiguous. A row with `ignore_index` is left alone.
        state: float32, (4, R), contiguous.
        first: The class of the tile's first column.
        softcap: Logits are `softcap * tanh(logits / softcap)`; None for as they are.
        ignore_index: See `target`.
        with_sum: Whether the sum of the logits is wanted.
    """
    _launch(
        _statistics_kernel,
        tile,
        target,
        state,
        tile.shape[0],
        tile.shape[1],
        first,
        1.0 if softcap is None else softcap,
        ignore_index,
        HAS_SOFTCAP=softcap is not None,
        WITH_SUM=with_sum,
    )


def spread_rows(
    tile: Tensor,
    target: Tensor,
    numbers: Tensor,
    sums: Tensor,
    link: Exponential,
    *,
    softcap: float | None,
    ignore_index: int,
) -> None:
    """Add value and slope of the link at every logit of a row to `sums`, float32, (2, R)."""
    _launch(
        _spread_kernel,
        tile,
        target,
        numbers,
        sums,
        tile.shape[0],
        tile.shape[1],
        1.0 if softcap is None else softcap,
        *link,
        ignore_index,
        HAS_SOFTCAP=softcap is not None,
    )


def gradient_rows(
    tile: Tensor,
    target: Tensor,
    numbers: Tensor,
    link: Exponential,
    *,
    first: int,
    softcap: float | None,
    ignore_index: int,
) -> None:
    """Turn raw logits into their gradient; rows with `ignore_index` become zeros.

    Args:
        tile: As `statistics_rows`; overwritten.
        target: As there.
        numbers: float32, (3, 4 or 6, R), contiguous; see `blocks.gradient`.
        link: The link, where label smoothing applies it to every logit.
        first: The class of the tile's first column.
        softcap: As there.
        ignore_index: As there.
    """
    _launch(
        _gradient_kernel,
        tile,
        target,
        numbers,
        tile.shape[0],
        tile.shape[1],
        first,
        1.0 if softcap is None else softcap,
        *link,
        ignore_index,
        HAS_SOFTCAP=softcap is not None,
        SCALED=len(numbers) > 3,
        SMOOTHED=len(numbers) > 4,
    )
