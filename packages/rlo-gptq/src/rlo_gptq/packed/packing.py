"""Codes of 1 to 8 bits as a dense little-endian bit stream in int32 words, one stream for each row.

Code `j` of a row takes the bits `j * bits ... (j + 1) * bits - 1` of the row's stream, lowest bit
first, so that codes of 3 bits straddle words and nothing is wasted but the end of the last word.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

WORD = 32
_BYTE = 8


def packed_words(columns: int, bits: int) -> int:
    """Return the number of int32 words that `columns` codes of `bits` bits take."""
    return -(-columns * bits // WORD)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= _BYTE:
        raise ValueError(f"bits must be in 1..8, got {bits}")
    if sys.byteorder != "little":  # the words are viewed as bytes
        raise RuntimeError("packing needs a little-endian machine")


def _octets(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the shifts of 8 codes inside 8 * bits bits, and those of the `bits` bytes they
    fill.
    """
    codes = torch.arange(_BYTE, dtype=torch.int64, device=device) * bits
    stream = torch.arange(bits, dtype=torch.int64, device=device) * _BYTE
    return codes, stream


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into int32 words.

    Eight codes always fill `bits` whole bytes, so the work goes eight codes at a time.

    Args:
        codes: Shape (rows, columns), an integer type, values in [0, 2^bits - 1].
        bits: Bits of a code, 1 to 8.

    Returns:
        Shape (rows, ceil(columns * bits / 32)), int32.

    Raises:
        ValueError: a code is out of range, or `bits` is.
    """
    _check_bits(bits)
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (rows, columns), got {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(
            f"codes must be in 0..{(1 << bits) - 1} for {bits} bits, "
            f"got {int(codes.min())}..{int(codes.max())}"
        )
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    code_shift, byte_shift = _octets(bits, codes.device)
    packed = torch.zeros(rows, words * WORD // _BYTE, dtype=torch.uint8, device=codes.device)
    step = max(1, (1 << 18) // max(1, columns))  # int64 temporaries of at most 2 MiB
    for start in range(0, rows, step):
        part = codes[start : start + step].to(torch.int64)
        part = torch.nn.functional.pad(part, (0, -columns % _BYTE)).view(part.shape[0], -1, _BYTE)
        # 8 codes of 8 bits would fill the sign bit of int64: two's complement addition still gives
        # the right bit pattern, and the mask below takes the bytes out of it.
        octet = (part << code_shift).sum(-1, keepdim=True)
        stream = ((octet >> byte_shift) & 0xFF).to(torch.uint8).flatten(1)
        width = min(stream.shape[1], packed.shape[1])
        packed[start : start + step, :width] = stream[:, :width]
    return packed.view(torch.int32)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: Shape (rows, ceil(columns * bits / 32)), int32.
        bits: Bits of a code, 1 to 8.
        columns: Codes in a row.

    Returns:
        Shape (rows, columns), uint8.
    """
    _check_bits(bits)
    words = packed_words(columns, bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ValueError(
            f"packed must be int32 of shape (rows, {words}) for {columns} codes of {bits} bits, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    stream = packed.contiguous().view(torch.uint8)
    if bits == _BYTE:
        return stream[:, :columns].contiguous()
    if bits in (1, 2, 4):  # codes do not straddle bytes: no wide integers
        shift = torch.arange(_BYTE // bits, dtype=torch.uint8, device=packed.device) * bits
        codes = (stream.unsqueeze(-1) >> shift) & ((1 << bits) - 1)
        return codes.flatten(1)[:, :columns].contiguous()
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits))
    code_shift, byte_shift = _octets(bits, packed.device)
    octet = (stream.view(stream.shape[0], -1, bits).to(torch.int64) << byte_shift).sum(-1, True)
    codes = ((octet >> code_shift) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
    return codes[:, :columns].contiguous()
