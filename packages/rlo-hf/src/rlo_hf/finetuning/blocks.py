"""Text to blocks of token ids of one length: what causal language models are finetuned on."""

from __future__ import annotations

from typing import Any

import torch
from rlo_core.errors import DataError
from rlo_core.lm.text import TextData
from torch import Tensor

_PIECE = 100_000
"""Characters of a running text that are tokenized at a time: a tokenizer is quadratic in some."""


def token_ids(data: TextData, tokenizer: Any) -> Tensor:
    """Return the text as one 1-D tensor of ids.

    A running text is tokenized as a whole, with the special tokens that the tokenizer puts around
    one text. Documents are tokenized one by one, each with its own, and an end-of-text token after
    those whose tokenizer adds nothing, so that the model sees where one ends.

    Args:
        data: The text.
        tokenizer: A transformers tokenizer.
    """
    if data.running:
        # No warning that the text is longer than the context: it is cut into blocks next.
        return torch.tensor(tokenizer(data.joined, verbose=False)["input_ids"])
    ids: list[int] = []
    end = tokenizer.eos_token_id
    texts = [text for text in data.documents if text.strip()]
    for row in tokenizer(texts, verbose=False)["input_ids"]:
        ids += row
        if end is not None and row[:1] != [tokenizer.bos_token_id] and row[-1:] != [end]:
            ids.append(end)
    return torch.tensor(ids)


def blocks_of(ids: Tensor, block: int) -> list[dict[str, Tensor]]:
    """Cut ids into blocks of `block` tokens, the remainder left out; labels are the ids themselves.

    Raises:
        DataError: there is not one block.
    """
    count = len(ids) // block
    if count == 0:
        raise DataError(f"the text has {len(ids)} tokens, which is less than one block of {block}")
    rows = ids[: count * block].view(count, block)
    return [{"input_ids": row, "labels": row} for row in rows]
