"""Random numbers by counter: the same words for a seed on every platform and device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9


_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def random_words(seed: int, stream: int, count: int) -> Tensor:
    """Return `count` 64-bit words of SplitMix64 at counters 0, 1, ... of one stream of one seed.

    Integer arithmetic modulo 2^64 only, so the words are the same on every platform and device, and
    word i does not depend on how many are asked for.

    Args:
        seed: any integer that fits 64 bits.
        stream: number of the stream, at least 0; streams of one seed are independent.
        count: number of words.

    Returns:
        int64 tensor (count,) on the CPU.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    origin = _mix(torch.tensor([seed], dtype=torch.int64) + _GAMMA)
    origin = _mix(origin + _GAMMA * torch.tensor([stream + 1], dtype=torch.int64))
    counters = torch.arange(1, count + 1, dtype=torch.int64)
    return _mix(torch.add(origin, counters * _GAMMA))


def random_uniforms(seed: int, stream: int, count: int) -> Tensor:
    """Return `count` float64 numbers in (0, 1), multiples of 2^-53 plus 2^-54."""
    top = _shift_right(random_words(seed, stream, count), 11)
    return (top.to(torch.float64) + 0.5) * 2.0**-53


def random_normals(seed: int, stream: int, count: int) -> Tensor:
    """Return `count` float64 standard normal numbers, by Box and Muller."""
    u = random_uniforms(seed, stream, 2 * count)
    return (-2 * u[:count].log()).sqrt() * (2 * math.pi * u[count:]).cos()


def random_permutation(seed: int, stream: int, n: int) -> Tensor:
    """Return a uniform permutation of 0..n-1, int64 (n,)."""
    return torch.argsort(random_words(seed, stream, n), stable=True)


def random_signs(seed: int, stream: int, n: int) -> Tensor:
    """Return n random signs, float32 (n,) of -1 and 1."""
    return 1.0 - 2.0 * _shift_right(random_words(seed, stream, n), 63).to(torch.float32)


def random_orthogonal(seed: int, stream: int, blocks: int, size: int) -> Tensor:
    """Return `blocks` orthogonal matrices, Haar-distributed, float64 (blocks, size, size)."""
    normal = random_normals(seed, stream, blocks * size * size).view(blocks, size, size)
    q, r = torch.linalg.qr(normal)
    # Without the signs of r's diagonal, q is not uniform (Mezzadri 2007).
    return torch.mul(q, r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :])


def _mix(x: Tensor) -> Tensor:
    x = torch.mul(x ^ _shift_right(x, 30), _MIX1)
    x = torch.mul(x ^ _shift_right(x, 27), _MIX2)
    return torch.bitwise_xor(x, _shift_right(x, 31))


def _shift_right(x: Tensor, by: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask removes the copied sign bits.
    return torch.bitwise_and(x >> by, (1 << (64 - by)) - 1)
