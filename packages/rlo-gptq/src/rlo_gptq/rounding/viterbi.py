r"""The best codes of a sequence for a trellis, by Viterbi's algorithm.

A state is r K + c, c its newest code of K possible ones; costs are laid out (c, r). A step is a
minimum over the oldest code, then :math:`w (x - v)^2` without its constant part, for all states.
Only the minima are kept, a K-th of the costs: on the way back, the few costs that decide are
computed again. On a CPU with numba a step is two loops; without, the same operations in the same
order are torch's, so that the codes are the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlo_gptq.rounding.trellis import Trellis, decode, runs_of

_KEPT = 1 << 25
"""Numbers that are kept of a batch of sequences on a CPU: 128 MiB."""


def search_bytes(m: int, trellis: Trellis) -> int:
    """Return the memory that encoding a column of m rows takes at most."""
    n = max(trellis.lengths(m))
    inner = trellis.states >> trellis.bits
    kept = max(n * inner, min(m * inner, _KEPT))
    return 4 * (kept + 8 * trellis.states)


def encode(x: Tensor, weight: Tensor, trellis: Trellis) -> Tensor:
    r"""Return the codes of one column that minimise :math:`\sum_r w_r (x_r - v_r)^2`, nearly.

    Exact but for the codes at the seam of each sequence, which are guessed from the rows on either
    side and then held.

    Args:
        x: targets divided by the scale of their row, (m,).
        weight: w, squared scales, (m,).
        trellis: Whose codes.

    Returns:
        int64 (m,).
    """
    parts = []
    for start, n, count in runs_of(trellis.lengths(len(x))):
        rows = slice(start, start + n * count)
        found = _encode_batch(
            x[rows].view(count, n).float(), weight[rows].view(count, n).float(), trellis
        )
        parts.append(found.reshape(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encode_batch(x: Tensor, weight: Tensor, trellis: Trellis) -> Tensor:
    """Encode sequences of one length, (batch, n); exhaustively where n is shorter than a state."""
    n = x.shape[1]
    if n < trellis.symbols:
        numbers = torch.arange(1 << (trellis.bits * n), device=x.device)
        shifts = torch.arange(n, device=x.device) * trellis.bits
        every = (numbers[:, None] >> shifts) & ((1 << trellis.bits) - 1)
        values = decode(every, trellis, [n])
        best = [
            ((row - values).square() * w).sum(1).argmin() for row, w in zip(x, weight, strict=True)
        ]
        return every[torch.stack(best)]
    search = search_of(x.device, trellis)
    window = min(trellis.seam, n)
    around = torch.cat([torch.arange(n - window, n), torch.arange(window)]).to(x.device)
    guess = search(x[:, around], weight[:, around], None)
    seam = torch.zeros_like(guess[:, 0])
    for i in range(window - (trellis.symbols - 1), window):
        seam = (seam << trellis.bits) | guess[:, i]
    return search(x, weight, seam & ((trellis.states >> trellis.bits) - 1))


Search = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From x and w (batch, n) to codes (batch, n); the codes of a state at both ends, all but the
oldest, are `seam` (batch,) if it is given."""


def search_of(device: torch.device, trellis: Trellis, *, compiled: bool | None = None) -> Search:
    """Return the search for a device.

    Args:
        device: Of the sequences.
        trellis: Whose codes.
        compiled: Use numba; by default on a CPU where it is installed.
    """
    if compiled is None:
        compiled = device.type == "cpu" and compiler_works()
    return functools.partial(_compiled if compiled else _in_torch, trellis)


@functools.cache
def compiler_works() -> bool:
    """Return whether numba is there and goes with the numpy that is."""
    try:
        import rlo_gptq.rounding.viterbi_numba  # noqa: F401
    except ImportError:
        return False
    return True


def _by_newest(trellis: Trellis, device: torch.device) -> Tensor:
    """Return the values of states as costs are laid out, (c, r)."""
    return trellis.values(device).view(-1, 1 << trellis.bits).T.contiguous()


def _compiled(trellis: Trellis, x: Tensor, weight: Tensor, seam: Tensor | None) -> Tensor:
    from rlo_gptq.rounding.viterbi_numba import best_codes

    values = _numpy_values(trellis)
    found = torch.empty(x.shape, dtype=torch.int64)
    kept = _room(x.shape[1] * (trellis.states >> trellis.bits))
    ends = [-1] * len(x) if seam is None else seam.tolist()
    for row, (targets, weights, end) in enumerate(zip(x, weight, ends, strict=True)):
        target, scale = targets.contiguous().numpy(), weights.contiguous().numpy()
        best_codes(target, scale, values, trellis.bits, end, kept, found[row].numpy())
    return found


@functools.lru_cache(maxsize=8)
def _numpy_values(trellis: Trellis) -> Any:
    return _by_newest(trellis, torch.device("cpu")).view(-1).numpy()


_rooms = threading.local()


def _room(numbers: int) -> Any:
    """Return an array of at least so many, the last one again: pages that are new cost a third."""
    room = getattr(_rooms, "room", None)
    if room is None or len(room) < numbers:
        room = _rooms.room = torch.empty(numbers).numpy()
    return room


def _in_torch(trellis: Trellis, x: Tensor, weight: Tensor, seam: Tensor | None) -> Tensor:
    """Search some sequences at a time, as many as there is room for."""
    per_sequence = x.shape[1] * (trellis.states >> trellis.bits)
    step = len(x) if x.is_cuda else max(1, _KEPT // per_sequence)
    parts = [
        _torch_batch(
            trellis,
            x[at : at + step],
            weight[at : at + step],
            None if seam is None else seam[at : at + step],
        )
        for at in range(0, len(x), step)
    ]
    return torch.cat(parts)


def _torch_batch(trellis: Trellis, x: Tensor, weight: Tensor, seam: Tensor | None) -> Tensor:
    (batch, n), K, inner = x.shape, 1 << trellis.bits, trellis.states >> trellis.bits
    device, outer = x.device, (trellis.states >> trellis.bits) // (1 << trellis.bits)
    value = _by_newest(trellis, device)[:, None]  # (c, 1, r)
    cost = torch.zeros(K, batch, inner, device=device)
    closed = cost
    if seam is not None:
        state = torch.arange(inner, device=device) * K + torch.arange(K, device=device)[:, None]
        open_ = (state % inner)[:, None] == seam[:, None]
        closed = torch.where(open_, 0.0, torch.inf)
        cost = closed.clone()
    # w v^2 - 2 w x v, as (w v + a) v.
    slope = weight * x * -2
    kept, low = torch.empty(n, batch, inner, device=device), torch.empty(K, batch, outer)
    low = low.to(device)
    term = torch.empty_like(cost)
    for t in range(n):
        by_oldest = cost.view(K, batch, K, outer)
        torch.minimum(by_oldest[:, :, 0], by_oldest[:, :, 1], out=low)
        for code in range(2, K):
            torch.minimum(low, by_oldest[:, :, code], out=low)
        kept[t].view(batch, outer, K).copy_(low.permute(1, 2, 0))
        torch.mul(value, weight[:, t, None], out=term)
        term.add_(slope[:, t, None]).mul_(value)
        torch.add(term, kept[t], out=cost)
    last = (cost + closed if seam is not None else cost).permute(1, 2, 0).reshape(batch, -1)
    state = last.argmin(1)
    every, of_state = torch.arange(batch, device=device), trellis.values(device)
    oldest = torch.arange(K, device=device) * inner
    path = torch.empty(n, batch, dtype=torch.int64, device=device)
    for step in range(n - 1, -1, -1):
        path[step] = state & (K - 1)
        if not step:
            break
        before = oldest + (state >> trellis.bits)[:, None]  # (batch, K)
        v = of_state[before]
        costs = kept[step - 1][every[:, None], before >> trellis.bits]
        costs = costs + (v * weight[:, step - 1, None] + slope[:, step - 1, None]) * v
        state = before.gather(1, costs.argmin(1, keepdim=True))[:, 0]
    return path.T
