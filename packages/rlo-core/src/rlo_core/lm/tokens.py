r"""From text to tokens, and from tokens to windows: one rule for training, calibrating, measuring.

The protocol, so that two commands that read one text see the same tokens:

- **A running text** (one file, or lines that belong together, such as WikiText-2's) is joined and
  tokenized as one string, with the special tokens that the tokenizer puts around one text. WikiText
  rows are joined by an empty line. That is the field's WikiText-2 perplexity (GPTQ, QuIP, AWQ).
- **Separate documents** (jsonl, parquet, a folder of texts) have no protocol that the field agrees
  on. Ours: empty documents are left out; each other one is tokenized with its own special tokens;
  where the tokenizer marks neither its beginning nor its end, the end-of-text token follows it, so
  that the model sees where one ends.
- **Windows** do not overlap (the stride is their length), the first token of each is context only,
  and a last window that is not full is left out (`rlo_core.lm.perplexity`). A window is as long as
  the model's context, at most 2,048 tokens, where nothing else is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlo_core.errors import DataError
from rlo_core.lm.text import TextData

LONGEST_WINDOW = 2048
"""Tokens of a window in the field's tables, for models that allow as many."""


def token_ids(tokenizer: Any, data: TextData) -> Tensor:
    """Return a text as one row of token ids, (n,), int64; see the module for the rule.

    Args:
        tokenizer: A transformers tokenizer, or what is called as one.
        data: From `rlo_core.lm.text.load_text`.
    """
    # verbose=False: no warning that the text is longer than the context; it is cut into windows.
    options = {"return_attention_mask": False, "verbose": False}
    if data.running:
        return torch.tensor(tokenizer(data.joined, **options)["input_ids"], dtype=torch.int64)
    documents = [text for text in data.documents if text.strip()]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[int] = []
    for row in tokenizer(documents, **options)["input_ids"]:
        ids += row
        marked = (begin is not None and row[:1] == [begin]) or row[-1:] == [end]
        if end is not None and not marked:
            ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def token_blocks(ids: Tensor, length: int) -> Tensor:
    """Return ids as rows of `length` tokens, (blocks, length); the remainder is left out.

    Raises:
        DataError: there is not one block.
    """
    count = len(ids) // length
    if count == 0:
        raise DataError(f"the text has {len(ids)} tokens, which is less than one block of {length}")
    return ids[: count * length].view(count, length)


def window_length(config: Any, asked: int | None = None) -> int:
    """Return the tokens of a perplexity window for a model.

    Args:
        config: Its transformers configuration.
        asked: What the user asks for; None is the model's context, at most 2,048.

    Raises:
        DataError: the model has a table of positions, and it is shorter than `asked`.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if asked is None:
        return min(int(longest or LONGEST_WINDOW), LONGEST_WINDOW)
    # Rotated positions have no end, and how far they carry is worth measuring.
    if longest and asked > longest and not getattr(text, "rope_parameters", None):
        raise DataError(f"context must be at most the model's {longest}, got {asked}")
    return asked
