"""The sequences of a text that are trained on, and those that are held out: they share no token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlo_gptq.calibration.hessian_sum import CalibrationError
from rlo_gptq.calibration.sequences import sample_sequences

HELD_OUT = 8
"""One sequence in this many is held out, and at least one."""


def split_sequences(ids: Tensor, *, count: int, length: int, seed: int) -> tuple[Tensor, int]:
    """Return sequences of a text, (count, length), and how many of them, the last, are held out.

    Those come from the last eighth of the text, the others from what is before it.

    Raises:
        CalibrationError: the text is too short for one of each.
    """
    held = max(1, count // HELD_OUT)
    border = len(ids) - max(length, len(ids) // HELD_OUT)
    if border < length:
        raise CalibrationError(
            f"the text must have at least {2 * length} tokens, {length} of them to be held out, "
            f"got {len(ids)}; give more text or a smaller --seqlen"
        )
    trained = sample_sequences(ids[:border], count=count - held, length=length, seed=seed)
    # Evenly spread, so that as much of the text as can be is seen.
    starts = torch.linspace(border, len(ids) - length, held).round().long().tolist()
    return torch.cat([trained, *(ids[None, at : at + length] for at in starts)]), held


def batch_of(step: int, *, batch: int, count: int, seed: int) -> list[int]:
    """Return the numbers of a step's sequences: every epoch in an order of its own.

    A function of the step alone, so that a run that goes on needs to know nothing else.
    """
    batch = min(batch, count)
    per_epoch = count // batch
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    return order[at * batch : (at + 1) * batch]
