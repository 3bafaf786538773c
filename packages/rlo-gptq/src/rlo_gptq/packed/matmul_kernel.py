r"""Products with packed 2- to 8-bit weights on CUDA, for few rows of inputs.

Decoding one token is bound by reading the weights; this reads them packed, b/16 of half precision,
and never writes them unpacked. The rotation of the inputs is beside it, in `incoherence.Rotation`.
Tested under TRITON_INTERPRET=1 on a CPU against the torch path; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS, COLUMNS = 16, 128
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _packed_kernel(  # type: ignore[no-untyped-def]
    x,
    packed,
    scales,
    zeros,
    y,
    outputs,
    columns,
    words,
    groups,
    group_size,
    zero,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1)
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = out < outputs
    total = tl.zeros([OUTPUTS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        held = inside[:, None] & (column < columns)[None, :]
        bit = column * BITS
        word, shift = bit // 32, bit % 32
        at = out[:, None] * words + word[None, :]
        low = tl.load(packed + at, mask=held, other=0).to(tl.uint32, bitcast=True)
        code = low >> shift[None, :].to(tl.uint32)
        if 32 % BITS != 0:
            # A code may end in the next word; a shift by 32 is undefined.
            straddles = shift > 32 - BITS
            beyond = held & straddles[None, :]
            high = tl.load(packed + at + 1, mask=beyond, other=0).to(tl.uint32, bitcast=True)
            left = tl.where(straddles, 32 - shift, 0)[None, :].to(tl.uint32)
            code = code | tl.where(straddles[None, :], high << left, 0)
        code = (code & ((1 << BITS) - 1)).to(tl.float32)
        group = out[:, None] * groups + (column // group_size)[None, :]
        scale = tl.load(scales + group, mask=held, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            code -= tl.load(zeros + group, mask=held, other=0.0).to(tl.float32)
        else:
            code -= zero
        value = tl.load(x + row * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(code * scale * value.to(tl.float32)[None, :], axis=1)
    tl.store(y + row * outputs + out, total.to(y.dtype.element_ty), mask=inside)


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    r"""Return :math:`x \hat W^T` with :math:`\hat W = s (c - z)` read from packed codes.

    Args:
        x: (n, d), any floating type; products are summed in float32.
        packed: (m, words) int32, see `packing.py`.
        scales: (m, groups).
        zeros: (m, groups), or one number.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: columns per group; less than 1 for one group.

    Returns:
        (n, m) in the type of x.
    """
    n, columns = x.shape
    outputs, words = packed.shape
    y = torch.empty(n, outputs, dtype=x.dtype, device=x.device)
    per_column = isinstance(zeros, Tensor)
    _packed_kernel[(triton.cdiv(outputs, OUTPUTS), n)](
        x.contiguous(),
        packed,
        scales,
        zeros if per_column else scales,
        y,
        outputs,
        columns,
        words,
        scales.shape[1],
        group_size if scales.shape[1] > 1 else columns,
        0.0 if per_column else zeros,
        BITS=bits,
        HAS_ZEROS=per_column,
        OUTPUTS=OUTPUTS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return y
