"""Calibration text as token sequences."""

from __future__ import annotations

import torch
from rlo_core.lm.text import TextData
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlo_gptq.calibration.hessian_sum import CalibrationError


def token_ids(tokenizer: PreTrainedTokenizerBase, data: TextData) -> Tensor:
    """Return the text as one row of token ids, (n,), int64.

    A running text is tokenized as one string, as the field's perplexities are; of separate
    documents each gets its own beginning-of-text token, if the tokenizer puts one.
    """
    if data.running:
        ids = tokenizer(data.joined, return_attention_mask=False, verbose=False)["input_ids"]
    else:
        pieces = tokenizer(data.documents, return_attention_mask=False, verbose=False)["input_ids"]
        ids = [token for piece in pieces for token in piece]
    return torch.tensor(ids, dtype=torch.int64)


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
