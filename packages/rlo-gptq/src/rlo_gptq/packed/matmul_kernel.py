r"""Products with packed weights on CUDA, for few rows of inputs: codes are unpacked in registers.

Decoding one token is bound by reading the weights; this reads them packed, b/16 of half precision,
and never writes them unpacked. The inputs are laid out beforehand so that what a lane needs lies in
a row: a lane reads a vector of words (16 bytes where the groups allow), takes its codes out of them
by shifts, multiplies them with the inputs of up to four rows, and applies scale and zero once for
each group, by :math:`\sum s (c - z) x = s (\sum c x - z \sum x)`. Lanes are summed at the end.

Codes of 3, 5 and 6 bits straddle words: there a lane reads the words of 32 codes one by one. A
trellis weight is looked up by its own code and those of the four rows before it in its sequence.
Tested under TRITON_INTERPRET=1 on a CPU and compiled ahead of time; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32
"""Lanes along a row of codes: one warp, so that the sum at the end stays inside it."""
WARPS = 1
"""Of a product's program: with more, the compiler lays inputs and codes out differently, and moves
them through shared memory for every code."""
OUTPUTS = 4
"""Rows of the weight in a program: 1024 programs for 4096 outputs."""
ROWS = 4
"""Rows of x in a program; more of them take more programs, for which the weights come out of the
second cache and are unpacked again: more accumulators would not fit in registers. Half as many for
float32 inputs, which take twice the registers."""
MOST_ROWS = 16
_PREPARE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_kernel(  # type: ignore[no-untyped-def]
    x,
    scale,
    order,
    prepared,
    columns,
    slots,
    PER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = at % slots * PER + at // slots
    held = (at < slots * PER) & (column < columns)
    source = column
    if HAS_ORDER:
        source = tl.load(order + column, mask=held, other=0)
    value = tl.load(x + row * columns + source, mask=held, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale + source, mask=held, other=0.0)
    tl.store(prepared + row * slots * PER + at, value, mask=at < slots * PER)


@triton.jit  # type: ignore[untyped-decorator]
def _grid_of(scales, zeros, zero, out, group, groups, held, HAS_ZEROS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale and zero, (outputs, 1, lanes)."""
    at = out[:, None, None] * groups + group[None, None, :]
    scale = tl.load(scales + at, mask=held, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        return scale, tl.load(zeros + at, mask=held, other=0.0).to(tl.float32)
    return scale, scale * 0.0 + zero


@triton.jit  # type: ignore[untyped-decorator]
def _finish(total, bias, y, out, row, outputs, rows, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over lanes, add the bias, store; total is (outputs, rows, lanes)."""
    result = tl.sum(total, axis=2)
    if HAS_BIAS:
        added = tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)
        result += added[:, None]
    at = row[None, :] * outputs + out[:, None]
    kept = (row < rows)[None, :] & (out < outputs)[:, None]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _vector_kernel(  # type: ignore[no-untyped-def]
    x,
    packed,
    scales,
    zeros,
    bias,
    y,
    rows,
    outputs,
    words,
    groups,
    group_lanes,
    zero,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # All tiles are (outputs, rows, lanes, vector), with 1 where a dimension does not matter: the
    # compiler then gives them one layout, and nothing is moved between threads.
    PER: tl.constexpr = 32 // BITS
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inside = (out < outputs)[:, None, None]
    step = (lane[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, None]
    weights = packed + out.to(tl.int64)[:, None, None, None] * words + step
    inputs = x + row[None, :, None, None] * (words * PER) + step
    asked = (row < rows)[None, :, None, None]
    total = tl.zeros([OUTPUTS, ROWS, LANES], tl.float32)
    for start in range(0, words, LANES * VECTOR):
        known = start + step < words
        w = tl.load(weights + start, mask=inside[:, :, :, None] & known, other=0)
        part = tl.zeros([OUTPUTS, ROWS, LANES, VECTOR], tl.float32)
        plain = tl.zeros([1, ROWS, LANES, VECTOR], tl.float32)
        for i in tl.static_range(PER):
            at = inputs + (start + i * words)
            value = tl.load(at, mask=asked & known, other=0.0).to(tl.float32)
            code = ((w >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            part += code * value
            plain += value
        group = (start // VECTOR + lane) // group_lanes
        held = inside & (group < groups)[None, None, :]
        scale, offset = _grid_of(scales, zeros, zero, out, group, groups, held, HAS_ZEROS)
        total += scale * (tl.sum(part, axis=3) - offset * tl.sum(plain, axis=3))
    _finish(total, bias, y, out, row, outputs, rows, HAS_BIAS)


@triton.jit  # type: ignore[untyped-decorator]
def _stream_kernel(  # type: ignore[no-untyped-def]
    x,
    packed,
    scales,
    zeros,
    bias,
    y,
    rows,
    outputs,
    words,
    slots,
    groups,
    group_lanes,
    zero,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inside = (out < outputs)[:, None, None]
    asked = (row < rows)[None, :, None]
    total = tl.zeros([OUTPUTS, ROWS, LANES], tl.float32)
    for start in range(0, slots, LANES):
        slot = (start + lane)[None, None, :]
        weights = packed + out.to(tl.int64)[:, None, None] * words + slot * BITS
        inputs = x + row[None, :, None] * (slots * 32) + slot
        part = tl.zeros([OUTPUTS, ROWS, LANES], tl.float32)
        plain = tl.zeros([1, ROWS, LANES], tl.float32)
        before = tl.zeros([OUTPUTS, 1, LANES], tl.uint32)
        for j in tl.static_range(BITS):
            held = inside & (slot * BITS + j < words)
            w = tl.load(weights + j, mask=held, other=0).to(tl.uint32, bitcast=True)
            for i in tl.static_range(32):
                if (i * BITS + BITS - 1) // 32 == j:  # the codes that end in this word
                    if i * BITS >= 32 * j:
                        code = w >> (i * BITS - 32 * j)
                    else:
                        code = (before >> (32 + i * BITS - 32 * j)) | (w << (32 * j - i * BITS))
                    code = (code & ((1 << BITS) - 1)).to(tl.float32)
                    given = asked & (slot < slots)
                    value = tl.load(inputs + i * slots, mask=given, other=0.0).to(tl.float32)
                    part += code * value
                    plain += value
            before = w
        group = (start + lane) // group_lanes
        held = inside & (group < groups)[None, None, :]
        scale, offset = _grid_of(scales, zeros, zero, out, group, groups, held, HAS_ZEROS)
        total += scale * (part - offset * plain)
    _finish(total, bias, y, out, row, outputs, rows, HAS_BIAS)


@triton.jit  # type: ignore[untyped-decorator]
def _earlier_words(packed, earlier, out, outputs, words, word, held, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of the rows whose codes are BACK places before in their sequences."""
    row = tl.load(earlier + BACK * outputs + out, mask=out < outputs, other=0).to(tl.int64)
    return tl.load(packed + row[:, None, None] * words + word, mask=held, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _trellis_kernel(  # type: ignore[no-untyped-def]
    x,
    packed,
    scales,
    earlier,
    codebook,
    bias,
    y,
    rows,
    outputs,
    words,
    groups,
    group_words,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inside = (out < outputs)[:, None, None]
    asked = (row < rows)[None, :, None]
    total = tl.zeros([OUTPUTS, ROWS, LANES], tl.float32)
    for start in range(0, words, LANES):
        word = (start + lane)[None, None, :]
        held = inside & (word < words)
        a = _earlier_words(packed, earlier, out, outputs, words, word, held, 0)
        b = _earlier_words(packed, earlier, out, outputs, words, word, held, 1)
        c = _earlier_words(packed, earlier, out, outputs, words, word, held, 2)
        d = _earlier_words(packed, earlier, out, outputs, words, word, held, 3)
        e = _earlier_words(packed, earlier, out, outputs, words, word, held, 4)
        inputs = x + row[None, :, None] * (words * 16) + word
        part = tl.zeros([OUTPUTS, ROWS, LANES], tl.float32)
        for i in tl.static_range(16):
            state = (a >> (2 * i)) & 3
            state |= ((b >> (2 * i)) & 3) << 2
            state |= ((c >> (2 * i)) & 3) << 4
            state |= ((d >> (2 * i)) & 3) << 6
            state |= ((e >> (2 * i)) & 3) << 8
            given = asked & (word < words)
            value = tl.load(inputs + i * words, mask=given, other=0.0).to(tl.float32)
            part += tl.load(codebook + state) * value
        group = (start + lane) // group_words
        at = out[:, None, None] * groups + group[None, None, :]
        known = inside & (group < groups)[None, None, :]
        total += tl.load(scales + at, mask=known, other=0.0).to(tl.float32) * part
    _finish(total, bias, y, out, row, outputs, rows, HAS_BIAS)


def kernel_lanes(
    bits: int, group_size: int, groups: int, *, trellis: bool = False
) -> tuple[int, int] | None:
    """Return (codes of a lane, words of its vector), or None where a group ends inside a word.

    Args:
        bits: of a code; those that divide 32 are read by vectors of words.
        group_size: columns that share a scale.
        groups: in a row; one group may have any size.
        trellis: Whether codes are looked up, word by word.
    """
    straddles = 32 % bits != 0
    vectors = (1,) if trellis else (4, 2, 1)
    widths = [(32, bits)] if straddles else [(32 // bits * v, v) for v in vectors]
    for codes, vector in widths:
        if groups <= 1 or group_size % codes == 0:
            return codes, vector
    return None


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    *,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    order: Tensor | None = None,
    trellis: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Return :math:`(s_{in} x)_{order} \hat W^T + b`, with W unpacked from its codes on the way.

    Two launches: the inputs laid out for the lanes, and the product.

    Args:
        x: (n, d), n at most 16, any floating type; products are summed in float32.
        packed: (m, words) int32, see `packing.py`.
        scales: (m, groups).
        zeros: (m, groups), or one number.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: columns per group; less than 1 for one group. See `kernel_lanes`.
        bias: (m) or None.
        input_scale: float32, (d), or None.
        order: int32, (d): stored column j belongs to input order[j]; or None.
        trellis: codebook, (1024,) float32, and the rows of each state, (5, m) int32; None for a
            scalar grid.

    Returns:
        (n, m) in the type of x.
    """
    n, columns = x.shape
    outputs, words = packed.shape
    groups = scales.shape[1]
    y = torch.empty(n, outputs, dtype=x.dtype, device=x.device)
    lanes = kernel_lanes(bits, group_size, groups, trellis=trellis is not None)
    if lanes is None:
        raise ValueError(f"groups of {group_size} columns end inside a word of {bits}-bit codes")
    codes, vector = lanes
    straddles = 32 % bits != 0
    per, slots = (32, -(-columns // 32)) if straddles else (32 // bits, words)
    group_lanes = group_size // codes if groups > 1 else max(words, slots, 1)
    most = ROWS // 2 if x.dtype == torch.float32 else ROWS
    rows = min(most, triton.next_power_of_2(max(n, 1)))
    per_column = isinstance(zeros, Tensor)
    if n == 0 or outputs == 0:
        return y
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        prepared = torch.empty(n, slots * per, dtype=x.dtype, device=x.device)
        _prepare_kernel[(n, triton.cdiv(slots * per, _PREPARE))](
            x.contiguous(),
            x if input_scale is None else input_scale,
            x if order is None else order,
            prepared,
            columns,
            slots,
            PER=per,
            HAS_SCALE=input_scale is not None,
            HAS_ORDER=order is not None,
            BLOCK=_PREPARE,
            num_warps=4,
        )
        shape = {"ROWS": rows, "OUTPUTS": OUTPUTS, "LANES": LANES, "num_warps": WARPS}
        grid = (triton.cdiv(outputs, OUTPUTS), triton.cdiv(n, rows))
        added = y if bias is None else bias
        has_bias = bias is not None
        if trellis is not None:
            _trellis_kernel[grid](
                prepared,
                packed,
                scales,
                trellis[1],
                trellis[0],
                added,
                y,
                n,
                outputs,
                words,
                groups,
                group_lanes,
                HAS_BIAS=has_bias,
                **shape,
            )
            return y
        sizes = (n, outputs, words, slots, groups) if straddles else (n, outputs, words, groups)
        constants = shape if straddles else {**shape, "VECTOR": vector}
        kernel = _stream_kernel if straddles else _vector_kernel
        kernel[grid](
            prepared,
            packed,
            scales,
            zeros if per_column else scales,
            added,
            y,
            *sizes,
            group_lanes,
            0.0 if per_column else zeros,
            BITS=bits,
            HAS_ZEROS=per_column,
            HAS_BIAS=has_bias,
            **constants,
        )
    return y
