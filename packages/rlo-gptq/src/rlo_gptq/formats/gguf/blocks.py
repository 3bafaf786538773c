"""Codes and scales to the bytes of GGUF's blocks: one packer a type.

`gguf` packs the types that it quantizes by itself, but from weights; here the codes and scales are
given. Every packer takes codes (n, columns) and, an integer a sub-block or a number a block, what
`BlockGrid` holds of n blocks; it returns (n, size) bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlo_gptq.formats.gguf.grids import BlockGrid
from rlo_gptq.formats.gguf.types import BlockType

Bytes = npt.NDArray[Any]  # of uint8
Floats = npt.NDArray[np.float32]
_ROWS = 1024  # of a matrix, packed at one time


def pack_blocks(codes: Tensor, grid: BlockGrid) -> Tensor:
    """Return the bytes of a matrix, uint8 (m, d / columns * size).

    Args:
        codes: (d, m), transposed, as the rounding algorithms leave them.
        grid: By which they are read.
    """
    kind = grid.kind
    pack = _PACKERS[kind.name]
    m, blocks = codes.shape[1], len(grid.scales)
    parts = []
    for begin in range(0, m, _ROWS):
        rows = slice(begin, min(begin + _ROWS, m))

        def of(tensor: Tensor, width: int, rows: slice = rows) -> npt.NDArray[np.float32]:
            part = tensor[:, rows].T.reshape(-1, width)
            return np.ascontiguousarray(part.cpu().to(torch.float32).numpy())

        subs = kind.columns // kind.group
        packed = pack(
            of(codes, kind.columns).astype(np.uint8),
            of(grid.scales, 1),
            of(grid.subs, subs),
            of(grid.offsets, 1),
            of(grid.mins, subs),
        )
        parts.append(torch.from_numpy(packed.reshape(-1, blocks * kind.size)))
    return torch.cat(parts)


def unpack_blocks(packed: Tensor, kind: BlockType) -> Tensor:
    """Return the weights (m, d), float32, of the bytes of a matrix (m, bytes), by `gguf`."""
    import gguf

    number = gguf.GGMLQuantizationType[kind.name]
    found = gguf.dequantize(np.ascontiguousarray(packed.cpu().numpy()), number)
    return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


def _half(x: Floats) -> Bytes:
    return x.astype(np.float16).view(np.uint8)


def _nibbles(codes: Bytes) -> Bytes:
    """Pack four bits of the first half of a block beside those of the second."""
    low, high = np.split(codes & 15, 2, axis=1)
    packed: Bytes = low | (high << 4)
    return packed


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _by_fours(codes: Bytes, bits: int, width: int) -> Bytes:
    """Pack `bits` bits of runs of `width` codes side by side in bytes: runs 0, 1, ... of a byte."""
    runs = 8 // bits
    shaped = codes.reshape(len(codes), -1, runs, width) & ((1 << bits) - 1)
    shifts = (bits * np.arange(runs, dtype=np.uint8))[:, None]
    packed: Bytes = np.bitwise_or.reduce(shaped << shifts, axis=2)
    return packed.reshape(len(codes), -1)


def _signed(d: Floats, subs: Floats) -> Bytes:
    return _half(d * subs)


def _q4_0(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    return np.concatenate([_signed(d, subs), _nibbles(codes)], axis=1)


def _q4_1(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    return np.concatenate([_half(d), _half(-dmin), _nibbles(codes)], axis=1)


def _q5_0(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    return np.concatenate([_signed(d, subs), _fifth_bits(codes), _nibbles(codes)], axis=1)


def _q5_1(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    return np.concatenate([_half(d), _half(-dmin), _fifth_bits(codes), _nibbles(codes)], axis=1)


def _q8_0(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    return np.concatenate([_half(d), codes ^ 128], axis=1)  # minus 128, as a signed byte


def _q2_k(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    scales = subs.astype(np.uint8) | (mins.astype(np.uint8) << 4)
    return np.concatenate([scales, _by_fours(codes, 2, 32), _half(d), _half(dmin)], axis=1)


def _q3_k(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    high = _by_fours(codes >> 2, 1, 32)
    scales = (subs + 32).astype(np.uint8)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    packed = np.concatenate([low, _by_fours(scales >> 4, 2, 4)], axis=1)
    return np.concatenate([high, _by_fours(codes & 3, 2, 32), packed, _half(d)], axis=1)


def _scales_and_mins(subs: Floats, mins: Floats) -> Bytes:
    """Eight scales and eight mins of six bits in 12 bytes: the last four borrow two bits each."""
    s, m = subs.astype(np.uint8), mins.astype(np.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _q4_k(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    head = [_half(d), _half(dmin), _scales_and_mins(subs, mins)]
    return np.concatenate([*head, _by_fours(codes, 4, 32)], axis=1)


def _q5_k(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    head = [_half(d), _half(dmin), _scales_and_mins(subs, mins)]
    bits = [_by_fours(codes >> 4, 1, 32), _by_fours(codes & 15, 4, 32)]
    return np.concatenate([*head, *bits], axis=1)


def _q6_k(codes: Bytes, d: Floats, subs: Floats, dmin: Floats, mins: Floats) -> Bytes:
    low = _by_fours(codes & 15, 4, 64)
    high = _by_fours(codes >> 4, 2, 32)
    return np.concatenate([low, high, subs.astype(np.int8).view(np.uint8), _half(d)], axis=1)


_PACKERS: dict[str, Callable[[Bytes, Floats, Floats, Floats, Floats], Bytes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
