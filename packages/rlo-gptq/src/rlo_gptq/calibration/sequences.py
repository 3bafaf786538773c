"""Calibration sequences drawn from a text's tokens."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from rlo_gptq.calibration.hessian_sum import CalibrationError


def sample_sequences(ids: Tensor, *, count: int, length: int, seed: int) -> Tensor:
    """Return `count` spans of `length` tokens from random places, (count, length), as GPTQ draws
    them.

    Raises:
        CalibrationError: the text is shorter than one span.
    """
    if count < 1 or length < 2:
        raise CalibrationError(
            f"nsamples must be at least 1 and seqlen 2, got {count} and {length}"
        )
    if len(ids) < length:
        raise CalibrationError(
            f"calibration text must have at least {length} tokens, got {len(ids)}; "
            "give more text or a smaller --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def digest_of(sequences: Tensor) -> str:
    """Return what identifies calibration sequences, for a run that goes on with the same ones."""
    return hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:16]
