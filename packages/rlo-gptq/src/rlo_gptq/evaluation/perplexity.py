"""Perplexity by the field's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.lm.perplexity import perplexity
from rlo_core.lm.text import load_first_split

from rlo_gptq.calibration.sequences import token_ids
from rlo_gptq.checkpoint.load import weight_bytes
from rlo_gptq.evaluation.open_model import EvaluationError, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_WINDOW = 2048
"""Tokens of a window in the field's tables, for models that allow as many."""


def evaluate_perplexity(
    name: str,
    dataset: str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    split: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Return the perplexity of a model on a text: windows that do not overlap, first tokens unread.

    Args:
        name: A folder or hub name, quantized by us or not.
        dataset: What `load_text` takes; its test split, or its validation split without one.
        context: Tokens of a window; None is the model's length, at most 2048.
        max_tokens: Use only the beginning of the text.
        device: "auto", "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.
        split: Of the data set, if not the test split.
        progress: Called with windows done and windows in all.

    Returns:
        `perplexity`, `ce` (nats per token), `tokens`, `context`, `bytes`, `seconds`, `dataset`, ...
    """
    model, tokenizer, folder = open_model(name, device=device, dtype=dtype)
    data, found = load_first_split(dataset, [split] if split else ["test", "validation"])
    window = _window(model, context)
    begin = time.perf_counter()
    with torch.inference_mode():
        result = perplexity(
            model,
            token_ids(tokenizer, data),
            context=window,
            max_tokens=max_tokens,
            progress=progress,
        )
    return {
        "model": name,
        "dataset": dataset,
        "split": found,
        "fingerprint": data.fingerprint,
        "perplexity": result.perplexity,
        "ce": result.ce,
        "tokens": result.tokens,
        "context": window,
        "bytes": weight_bytes(folder),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _window(model: PreTrainedModel, context: int | None) -> int:
    """Return the tokens of a window.

    Raises:
        EvaluationError: the model has a table of positions, and it is shorter.
    """
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if context is None:
        return min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
    # Rotated positions have no end, and how far they carry is worth measuring.
    if longest and context > longest and not getattr(text, "rope_parameters", None):
        raise EvaluationError(f"context must be at most the model's {longest}, got {context}")
    return context
