r"""Perplexity of a causal language model, :math:`\exp(\text{mean token cross entropy})`.

Always of the cross entropy, whatever loss the model was trained with: exp of another loss is no
perplexity.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512
"""Rows of logits that are in float32 at one time: 64 MB at a vocabulary of 32,000."""


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured.

    Args:
        perplexity: exp(ce).
        ce: Mean cross entropy per predicted token, nats.
        tokens: How many tokens were predicted.
    """

    perplexity: float
    ce: float
    tokens: int


def token_ce(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> tuple[float, int]:
    """Return the summed cross entropy of kept targets in nats, in float64, and their count.

    Args:
        logits: (..., V), floating; cast to float32 a few rows at a time.
        target: (...), int64; `ignore_index` does not count.
        ignore_index: Targets with this value are left out.
    """
    rows, labels = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(labels), _ROWS):
        part = slice(start, start + _ROWS)
        ce = F.cross_entropy(
            rows[part].float(), labels[part], ignore_index=ignore_index, reduction="none"
        )
        total += ce.double().sum()
    return float(total), int((labels != ignore_index).sum())


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    input_ids: Tensor,
    *,
    context: int,
    batch_size: int = 1,
    max_tokens: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> PerplexityResult:
    """Measure perplexity over consecutive windows of `context` tokens that do not overlap.

    Each window predicts its own tokens after the first: `context - 1` predictions. A last window
    that is not full is left out, as in the GPTQ and QuIP evaluations, unless it is the only one.
    The model is put in evaluation mode and given back as it was.

    Args:
        model: Called as `model(input_ids)` with (batch, context) int64; returns logits
            (batch, context, V) or an object with `.logits`.
        input_ids: The text, 1-D int64.
        context: Tokens per window, >= 2.
        batch_size: Windows per call.
        max_tokens: Read at most this many of `input_ids`.
        progress: Called with (windows done, windows in all).

    Raises:
        ValueError: on a wrong shape or size, or on text of fewer than two tokens.
    """
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must be 1-D, got shape {tuple(input_ids.shape)}")
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids = input_ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"input_ids must have at least 2 tokens, got {len(ids)}")
    width = min(context, len(ids))
    windows = ids[: len(ids) // width * width].view(-1, width)
    device = next((p.device for p in model.parameters()), input_ids.device)
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False  # a cache of keys and values that nobody would read
    total, tokens = 0.0, 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            output = model(batch, **options)
            logits = output if isinstance(output, Tensor) else output.logits
            ce, count = token_ce(logits[:, :-1], batch[:, 1:])
            total, tokens = total + ce, tokens + count
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        for module, training in modes:
            module.training = training
    ce = total / tokens
    # exp overflows a float above 709; a broken model's perplexity is inf, not an exception.
    return PerplexityResult(math.exp(ce) if ce < 700 else math.inf, ce, tokens)
