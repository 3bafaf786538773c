"""Perplexity by the field's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rlo_core.lm.perplexity import perplexity
from rlo_core.lm.text import load_first_split
from rlo_core.lm.tokens import token_ids, window_length

from rlo_gptq.checkpoint.load import weight_bytes
from rlo_gptq.evaluation.open_model import calibration_fingerprints, open_model


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
        `perplexity`, `ce` (nats per token), `tokens`, `context`, `bytes`, `seconds`, `dataset`,
        ...; `calibrated_on_it` says that this very text was the calibration text.
    """
    model, tokenizer, folder = open_model(name, device=device, dtype=dtype)
    data, found = load_first_split(dataset, [split] if split else ["test", "validation"])
    window = window_length(model.config, context)
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
        "calibrated_on_it": data.fingerprint in calibration_fingerprints(folder),
        "perplexity": result.perplexity,
        "ce": result.ce,
        "tokens": result.tokens,
        "context": window,
        "bytes": weight_bytes(folder),
        "seconds": round(time.perf_counter() - begin, 3),
    }
