"""Codes of b bits as one dense little-endian stream of int32 words, as GPTQ files hold them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Return how many int32 words `count` codes of `bits` bits fill, which has to come out even.

    Raises:
        ValueError: the stream would end inside a word.
    """
    if count * bits % WORD:
        step = WORD // math.gcd(bits, WORD)
        raise ValueError(f"count must be a multiple of {step} at {bits} bits, got {count}")
    return count * bits // WORD


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2^bits - 1] along the first axis.

    Code i takes the bits [i*bits, (i+1)*bits) of its column's stream; at 3 bits codes straddle
    words.

    Args:
        codes: (n, columns), integer; n * bits must be a multiple of 32.
        bits: 1 to 8.

    Returns:
        (n * bits / 32, columns) int32.

    Raises:
        ValueError: a code is out of range, or the stream would end inside a word.
    """
    count, columns = codes.shape
    words = words_for(count, bits)
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 1 << bits):
        raise ValueError(
            f"codes must be in [0, {(1 << bits) - 1}] at {bits} bits, got "
            f"[{int(codes.min())}, {int(codes.max())}]"
        )
    run = WORD // math.gcd(bits, WORD)  # codes until the stream is at a word's start again
    chunk = codes.to(torch.int64).reshape(-1, run, columns)
    packed = torch.zeros(len(chunk), run * bits // WORD, columns, dtype=torch.int64)
    packed = packed.to(codes.device)
    for i in range(run):
        word, offset = divmod(i * bits, WORD)
        packed[:, word] |= chunk[:, i] << offset
        if offset + bits > WORD:
            packed[:, word + 1] |= chunk[:, i] >> (WORD - offset)
    packed &= 0xFFFFFFFF
    return (
        torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
        .to(torch.int32)
        .reshape(words, columns)
    )


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: (n * bits / 32, columns) int32.
        bits: 1 to 8.
        count: n.

    Returns:
        (n, columns) uint8.

    Raises:
        ValueError: the shape does not fit.
    """
    words = words_for(count, bits)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[0] != words:
        raise ValueError(
            f"packed must be int32 of shape ({words}, columns) for {count} codes of {bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    run = WORD // math.gcd(bits, WORD)
    columns = packed.shape[1]
    chunk = (packed.to(torch.int64) & 0xFFFFFFFF).reshape(-1, run * bits // WORD, columns)
    mask = (1 << bits) - 1
    codes = torch.empty(len(chunk), run, columns, dtype=torch.uint8, device=packed.device)
    for i in range(run):
        word, offset = divmod(i * bits, WORD)
        value = chunk[:, word] >> offset
        if offset + bits > WORD:
            value = value | (chunk[:, word + 1] << (WORD - offset))
        codes[:, i] = (value & mask).to(torch.uint8)
    return codes.reshape(count, columns)
