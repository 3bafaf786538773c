r"""Trellis-coded rounding at 2 bits: 2 bits a weight choose among 1024 values, not four.

A column of W is cut into sequences of about 128 rows. The value of a weight is looked up by a state
of ten bits, the last five 2-bit codes of its sequence, its own last; sequences close on themselves
(tail-biting), so exactly 2 bits a weight are stored. The best sequence is found by Viterbi's
algorithm. Down the rows, not along the columns: within one column all targets are known at once, so
feedback from column to column stays exact, and greedy passes stay possible.

The mean squared error on a Gaussian is 0.078, against 0.119 of four uniform levels and the
rate-distortion limit of 1/16.

Source: Marcellin, Fischer, "Trellis coded quantization", 1990; Mao, Gray, "Stationary and
trellis encoding", 2010 (random permutation codes); QTIP (2406.11235) for weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlo_gptq.rounding.grids import column_groups, stored
from rlo_gptq.rounding.random_streams import random_permutation
from rlo_gptq.settings import LayerSettings

SYMBOLS = 5  # codes in a state
STATES = 4**SYMBOLS
SEQUENCE = 128  # rows of a sequence, where the number of rows allows
# Rows on either side of the seam from which the codes at the seam are guessed.
_SEAM = 16
# Steps for which the costs of all states are written in one go: few calls, and still in the cache.
_STEPS = 8
_CODEBOOK_SEED = 0


@functools.lru_cache(maxsize=1)
def _gaussian_codebook() -> Tensor:
    levels = (torch.arange(STATES, dtype=torch.float64) + 0.5) / STATES
    values = torch.special.ndtri(levels)
    values = values / values.square().mean().sqrt()
    order = random_permutation(_CODEBOOK_SEED, 0, STATES)
    return torch.take(values, order).to(torch.float32)


def codebook(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of the states, unit variance, (1024,): normal quantiles in random order."""
    if device.type == "cpu":
        return _gaussian_codebook().to(dtype)
    return _codebook_there(device, dtype)


@functools.lru_cache(maxsize=16)
def _codebook_there(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same, copied once: a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        return _gaussian_codebook().to(device, dtype)


def sequence_lengths(m: int) -> list[int]:
    """Return the lengths of the sequences into which m rows are cut, near 128, equal if possible.

    A divisor of m between 64 and 256 is taken where there is one; otherwise lengths differ by one.
    """
    wanted = max(1, round(m / SEQUENCE))
    for count in sorted(range(-(-m // 256), m // 64 + 1), key=lambda n: abs(n - wanted)):
        if m % count == 0:
            return [m // count] * count
    short, longer = divmod(m, wanted)
    return [short + 1] * longer + [short] * (wanted - longer)


@functools.lru_cache(maxsize=32)
def _earlier_rows(lengths: tuple[int, ...]) -> Tensor:
    """Return for each row the rows of its state, newest first, (5, m), around the seam."""
    starts = [0, *itertools.accumulate(lengths)]
    rows = [
        [
            start + (i - back) % n
            for start, n in zip(starts, lengths, strict=False)
            for i in range(n)
        ]
        for back in range(SYMBOLS)
    ]
    return torch.tensor(rows)


@functools.lru_cache(maxsize=32)
def _earlier_rows_there(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _earlier_rows(lengths).to(device)


def earlier_rows(m: int) -> Tensor:
    """Return for each row of a matrix the five rows of its state, newest first, (5, m), int64."""
    return _earlier_rows(tuple(sequence_lengths(m)))


def decode(codes: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Return the unscaled values of codes; whole sequences only.

    Args:
        codes: (..., m) integers in 0..3, the rows of W along the last axis.
        lengths: of the sequences; default those of a matrix of m rows. A tile of a larger matrix
            passes the lengths of its own sequences.

    Returns:
        float32 (..., m).
    """
    m = codes.shape[-1]
    of = tuple(lengths or sequence_lengths(m))
    rows = _earlier_rows_there(of, codes.device) if codes.is_cuda else _earlier_rows(of)
    symbols = codes.to(torch.int64)
    state = symbols[..., rows[0]]
    for back in range(1, SYMBOLS):
        state = state + (symbols[..., rows[back]] << (2 * back))
    return codebook(codes.device)[state]


def decode_rows(read: Callable[[int, int], Tensor], m: int, start: int, stop: int) -> Tensor:
    """Return the unscaled values of rows start to stop of a matrix whose codes are read in pieces.

    Args:
        read: gives the codes (rows, d) of a range of rows.
        m: rows of the matrix.
        start: first row.
        stop: the row after the last.

    Returns:
        float32 (stop - start, d).
    """
    first, taken = 0, 0
    lengths: list[int] = []
    for n in sequence_lengths(m):
        if taken + n > start and taken < stop:
            first = first if lengths else taken
            lengths.append(n)
        taken += n
    codes = read(first, first + sum(lengths))
    return decode(codes.T, lengths).T[start - first : stop - first]


def encode(x: Tensor, weight: Tensor) -> Tensor:
    r"""Return the codes of one column that minimise :math:`\sum_r w_r (x_r - v_r)^2`, nearly.

    Exact but for the codes at the seam of each sequence, which are guessed from the 16 rows on
    either side and then held.

    Args:
        x: targets divided by the scale of their row, (m,).
        weight: w, squared scales, (m,).

    Returns:
        int64 (m,) in 0..3.
    """
    lengths = sequence_lengths(len(x))
    parts: list[Tensor] = []
    for n, group in itertools.groupby(lengths):
        size = n * len(list(group))
        taken = sum(part.numel() for part in parts)
        rows = slice(taken, taken + size)
        parts.append(_encode_batch(x[rows].view(-1, n), weight[rows].view(-1, n)).reshape(-1))
    return torch.cat(parts)


def _encode_batch(x: Tensor, weight: Tensor) -> Tensor:
    """Encode sequences of one length, (batch, n); exhaustively where n is shorter than a state."""
    n = x.shape[1]
    if n < SYMBOLS:
        every = torch.cartesian_prod(*[torch.arange(4)] * n).view(-1, n).to(x.device)
        values = decode(every, [n]).to(x.dtype)
        error = ((x[:, None] - values) ** 2 * weight[:, None]).sum(-1)
        return every[error.argmin(1)]
    window = min(_SEAM, n)
    around = torch.cat([torch.arange(n - window, n), torch.arange(window)]).to(x.device)
    guess = _viterbi(x[:, around], weight[:, around], None)
    seam = torch.zeros_like(guess[:, 0])
    for i in range(window - (SYMBOLS - 1), window):
        seam = (seam << 2) | guess[:, i]
    return _viterbi(x, weight, seam)


def _viterbi(x: Tensor, weight: Tensor, seam: Tensor | None) -> Tensor:
    """Return the best codes (batch, n); the four codes at both ends are `seam` if it is given.

    A state is 4 u + c, c its newest code; costs are laid out (c, batch, u), in which a step is a
    minimum over contiguous quarters, a small transposition and an addition. What a step reads and
    writes stays in a processor's cache: only the choices are kept, a byte for each.
    """
    batch, n = x.shape
    quarter, sixteenth = STATES // 4, STATES // 16
    empty = functools.partial(torch.empty, dtype=x.dtype, device=x.device)
    value = codebook(x.device, x.dtype).view(quarter, 4).T[:, None]  # (c, 1, u)
    older = torch.arange(quarter, device=x.device)
    ends = 4 * (older % sixteenth) + torch.arange(4, device=x.device)[:, None, None]
    closed = torch.zeros(4, batch, quarter, dtype=x.dtype, device=x.device)
    if seam is not None:
        closed.masked_fill_(ends != seam[:, None], float("inf"))
    scale = weight.T[:, None, :, None]
    target, square = scale * x.T[:, None, :, None], value.square()
    cost = closed.clone()
    # States 4 u + c follow the four states p * 256 + u.
    before = cost.view(4, batch, 4, sixteenth)
    first, second, third, fourth = before.unbind(2)
    low, high, best = (empty(4, batch, sixteenth) for _ in range(3))
    entering, terms = empty(batch, sixteenth, 4), empty(_STEPS, 4, batch, quarter)
    worse = torch.empty(n, 4, batch, 3, sixteenth, dtype=torch.bool, device=x.device)
    for start in range(0, n, _STEPS):
        steps = slice(start, min(start + _STEPS, n))
        # w (x - v)^2 without its constant part, for the next few steps and all states.
        ahead = torch.mul(scale[steps], square, out=terms[: steps.stop - start])
        ahead.addcmul_(target[steps], value, value=-2)
        for t, term in enumerate(ahead, start):
            torch.minimum(first, second, out=low)
            torch.minimum(third, fourth, out=high)
            torch.minimum(low, high, out=best)
            torch.ne(before[:, :, :3], best[:, :, None], out=worse[t])
            entering.copy_(best.permute(1, 2, 0))
            torch.add(term, entering.view(batch, quarter), out=cost)
    last = (cost + closed).permute(1, 2, 0).reshape(batch, STATES).argmin(1)
    # The first of the four that is not worse than the best, from 0.
    one, two, three = worse[1:].view(torch.uint8).unbind(3)
    oldest = (one * (1 + two * (1 + three))).permute(0, 2, 3, 1).to(torch.int64)
    offset = torch.arange(batch, device=x.device) * quarter
    came = oldest.mul_(sixteenth).add_(older[:sixteenth, None])
    came = came.reshape(n - 1, batch, quarter).add_(offset[:, None]).flatten(1)
    path = torch.empty(n, batch, dtype=torch.int64, device=x.device)
    path[n - 1] = (last >> 2) + offset
    for t in range(n - 1, 0, -1):
        torch.take(came[t - 1], path[t], out=path[t - 1])
    # The newest code of a step is the lowest of the older codes one step later.
    return torch.cat([path[1:] & 3, (last & 3)[None]]).T


class TrellisGrid:
    """Trellis-coded values: value = scale * v(state), one scale per row, group or matrix.

    Args:
        scales: (groups, m).
        group: (d,) int64, the group of each column.
    """

    def __init__(self, scales: Tensor, group: Tensor) -> None:
        self.group = group
        self.zeros = torch.zeros_like(scales)
        self._of = group.tolist()
        self.set_scales(scales)

    def set_scales(self, scales: Tensor) -> None:
        """Replace the scales, (groups, m)."""
        self.scales = scales
        self._inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))

    def round_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write nearly the best codes and their values of column j, all (m,)."""
        g = self._of[j]
        found = encode(x * self._inverse[g], self.scales[g].square())
        code.copy_(found)
        torch.mul(decode(found).to(value.dtype), self.scales[g], out=value)

    def improve_column(self, x: Tensor, j: int, code: Tensor, value: Tensor) -> None:
        """Write the new codes of those sequences that come nearer to x, and keep the others."""
        g = self._of[j]
        old_code = code.clone()
        old = decode(old_code).to(value.dtype) * self.scales[g]
        self.round_column(x, j, code, value)
        gain = (x - old).square() - (x - value).square()
        parts = torch.split_with_sizes(gain, sequence_lengths(len(x)))
        kept = torch.cat([part.sum().expand(len(part)) > 0 for part in parts])
        torch.where(kept, code, old_code, out=code)
        torch.where(kept, value, old, out=value)

    def round_all(self, x: Tensor) -> Tensor:
        """Return codes (d, m) of x (d, m), column by column."""
        codes, value = torch.empty_like(x), torch.empty_like(x[0])
        for j in range(len(x)):
            self.round_column(x[j], j, codes[j], value)
        return codes

    def units(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return v(state), (n, m)."""
        return decode(codes).to(self.scales.dtype)

    def values(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Return scale * v(state), (n, m)."""
        return self.units(codes, columns).mul_(self.scales[self.group[columns]])

    def join(self, others: Sequence[TrellisGrid]) -> TrellisGrid:
        """Return the grid of the outputs of all, along m."""
        scales = torch.cat([grid.scales for grid in (self, *others)], 1)
        return TrellisGrid(scales, self.group)


def fit_trellis(x: Tensor, settings: LayerSettings) -> TrellisGrid:
    """Return a grid whose scales are the root mean squares of targets x (d, m)."""
    d, m = x.shape
    group = column_groups(d, settings.group_size).to(x.device)
    rows = []
    for g in range(int(group[-1]) + 1):
        square = x[group == g].square()
        mean = square.mean().expand(m) if settings.group_size == 0 else square.mean(0)
        rows.append(stored(mean.sqrt(), settings.scale_dtype))
    return TrellisGrid(torch.stack(rows), group)
