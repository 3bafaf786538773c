r"""Trellis codes: b bits a weight choose among :math:`2^L` values, not :math:`2^b`.

A column of W is cut into sequences of rows. The value of a weight is looked up by a state of L
bits: the last codes of its sequence, its own the lowest. Sequences close on themselves
(tail-biting), so exactly b bits a weight are stored. Down the rows, not along the columns: within
one column all targets are known at once, so feedback from column to column stays exact, and greedy
passes stay possible.

With L = 10 the values are the normal distribution's quantiles in random order, a table. With more
bits the order is computed from the state by a few integer instructions, so that a processor without
room for the table need not have it; that codes better than sums of hashed bytes or half-precision
numbers (QTIP's 1MAD and 3INST), see benchmarks/bench_trellis.py.

Source: Marcellin, Fischer, "Trellis coded quantization", 1990; Mao, Gray, "Stationary and
trellis encoding", 2010 (random permutation codes); QTIP (2406.11235), weights, computed codes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlo_gptq.rounding.random_streams import random_permutation
from rlo_gptq.settings import trellis_state_bits

_CODEBOOK_SEED = 0
_TABLE_BITS = 10
"""States of the first kind of trellis, whose values come from a table in random order."""
# Odd numbers, of Murmur's and Knuth's hashes: a product with one is a permutation of the states.
_MIXERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


@dataclass(frozen=True)
class Trellis:
    """One kind of trellis.

    Args:
        bits: Of a code.
        state_bits: L, of a state.
    """

    bits: int
    state_bits: int

    @property
    def symbols(self) -> int:
        """Codes that a state is made of; of the oldest perhaps a part."""
        return -(-self.state_bits // self.bits)

    @property
    def states(self) -> int:
        """How many states there are."""
        return 1 << self.state_bits

    @property
    def sequence(self) -> int:
        """Rows of a sequence, where the number of rows allows.

        Closing a sequence costs about as much as one weight's whole error, more with longer states.
        """
        return 128 if self.state_bits == _TABLE_BITS else 1024

    @property
    def seam(self) -> int:
        """Rows on either side of a seam from which the codes at the seam are guessed."""
        return self.sequence // 8 if self.state_bits > _TABLE_BITS else 32

    def lengths(self, m: int) -> list[int]:
        """Return the lengths of the sequences into which m rows are cut, equal if possible.

        A divisor of m between a half and twice `sequence` is taken where there is one; otherwise
        lengths differ by one.
        """
        wanted = max(1, round(m / self.sequence))
        counts = range(-(-m // (2 * self.sequence)), 2 * m // self.sequence + 1)
        for count in sorted(counts, key=lambda n: abs(n - wanted)):
            if m % count == 0:
                return [m // count] * count
        short, longer = divmod(m, wanted)
        return [short + 1] * longer + [short] * (wanted - longer)

    def values(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of the states, unit variance, (2^L,): normal quantiles, permuted."""
        if device.type == "cpu":
            return _codebook(self.state_bits).to(dtype)
        return _codebook_there(self.state_bits, device, dtype)

    def rows_of_states(self, m: int) -> Tensor:
        """Return for each of m rows those of its state, newest first, (symbols, m), int64."""
        return _rows_of_states(self, m)


@functools.lru_cache(maxsize=32)
def _rows_of_states(trellis: Trellis, m: int) -> Tensor:
    parts, first = [], 0
    with torch.inference_mode(False):
        for n in trellis.lengths(m):
            back = torch.arange(trellis.symbols)[:, None]
            parts.append(first + (torch.arange(n) - back) % n)
            first += n
        return torch.cat(parts, 1)


def trellis_of(grid: str, bits: int) -> Trellis | None:
    """Return the trellis of a grid's name, None for a scalar grid."""
    state_bits = trellis_state_bits(grid)
    return None if state_bits is None else Trellis(bits, state_bits)


@functools.lru_cache(maxsize=8)
def _codebook(state_bits: int) -> Tensor:
    with torch.inference_mode(False):  # kept for those who train
        return _permuted_quantiles(state_bits)


def _permuted_quantiles(state_bits: int) -> Tensor:
    count = 1 << state_bits
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles = torch.special.ndtri(levels)
    quantiles = quantiles / quantiles.square().mean().sqrt()
    if state_bits == _TABLE_BITS:
        order = random_permutation(_CODEBOOK_SEED, 0, count)
    else:
        order = permuted_states(torch.arange(count), state_bits)
    return torch.take(quantiles, order).to(torch.float32)


@functools.lru_cache(maxsize=16)
def _codebook_there(state_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same, copied once: a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        return _codebook(state_bits).to(device, dtype)


def permuted_states(state: Tensor, state_bits: int) -> Tensor:
    """Return the rank of each state's value, a permutation computed from the state, int64.

    Three products with odd numbers and two shifted differences, all modulo 2^L.
    """
    mask, half = (1 << state_bits) - 1, state_bits // 2
    first, second, third = _MIXERS
    rank = (state * first) & mask
    rank = ((rank ^ (rank >> half)) * second) & mask
    return ((rank ^ (rank >> half)) * third) & mask


def runs_of(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first row, rows of a sequence, sequences) of each run of equal lengths."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for n in lengths:
        if runs and runs[-1][1] == n:
            runs[-1] = (runs[-1][0], n, runs[-1][2] + 1)
        else:
            runs.append((start, n, 1))
        start += n
    return runs


def _states(codes: Tensor, trellis: Trellis) -> Tensor:
    """Return the states (..., n) of codes (..., symbols - 1 + n), those before the first in front.

    Codes are joined to pairs, pairs to fours, and so on: fewer passes than there are codes.
    """
    state, have = codes.to(torch.int32), 1
    while have < trellis.symbols:
        take = min(have, trellis.symbols - have)
        low = state[..., take:]
        if take < have:
            low = low & ((1 << (trellis.bits * take)) - 1)
        state = low | state[..., : state.shape[-1] - take] << (trellis.bits * take)
        have += take
    return state & (trellis.states - 1)


def decode(codes: Tensor, trellis: Trellis, lengths: Sequence[int] | None = None) -> Tensor:
    """Return the unscaled values of codes; whole sequences only.

    Args:
        codes: (..., m) integers, the rows of W along the last axis.
        trellis: Of the codes.
        lengths: of the sequences; default those of a matrix of m rows.

    Returns:
        float32 (..., m).
    """
    values, parts = trellis.values(codes.device), []
    before = trellis.symbols - 1
    for start, n, count in runs_of(lengths or trellis.lengths(codes.shape[-1])):
        block = codes[..., start : start + n * count]
        block = block.reshape(*codes.shape[:-1], count, n)
        if before <= n:
            head = block[..., n - before :]
        else:  # around more than once
            head = block[..., torch.arange(-before, 0, device=codes.device) % n]
        state = _states(torch.cat([head, block], -1), trellis)
        parts.append(values.index_select(0, state.flatten()).view(state.shape).flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def decode_rows(
    read: Callable[[int, int], Tensor], trellis: Trellis, m: int, start: int, stop: int
) -> Tensor:
    """Return the unscaled values of rows start to stop of a matrix whose codes are read in pieces.

    Args:
        read: gives the codes (rows, d) of a range of rows.
        trellis: Of the codes.
        m: rows of the matrix.
        start: first row.
        stop: the row after the last.

    Returns:
        float32 (stop - start, d).
    """
    before, parts = trellis.symbols - 1, []
    bounds = [0, *itertools.accumulate(trellis.lengths(m))]
    inside = [(a, b) for a, b in itertools.pairwise(bounds) if b > start and a < stop]
    whole = [(a, b) for a, b in inside if start <= a and b <= stop]
    for first, end in inside:
        low, high = max(start, first), min(stop, end)
        if whole and (first, end) == whole[0]:  # all of them at once
            lengths = [b - a for a, b in whole]
            parts.append(decode(read(first, whole[-1][1]).T, trellis, lengths).T)
        elif (first, end) in whole:
            continue
        elif end - first <= before:
            decoded = decode(read(first, end).T, trellis, [end - first]).T
            parts.append(decoded[low - first : high - first])
        else:
            missing = max(0, before - (low - first))
            codes = read(low - before + missing, high)
            if missing:  # what comes before the first row is at the end of the sequence
                codes = torch.cat([read(end - missing, end), codes])
            state = _states(codes.T, trellis).T
            values = trellis.values(codes.device).index_select(0, state.flatten())
            parts.append(values.view(state.shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
