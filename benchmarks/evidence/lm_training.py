"""Train or finetune a small causal language model with any loss of the family."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rlo_core.lm.perplexity import perplexity
from rlo_core.lm.text import TextData
from rlo_hf import set_loss
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

LOG_EVERY = 10


@dataclass(frozen=True)
class Parts:
    """The tokens of a text, 1-D int64: what is trained on, tuned on, and reported."""

    train: Tensor
    validation: Tensor
    test: Tensor


def tokens_of(data: TextData, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return a text as one sequence; separate documents each begin with the tokenizer's mark."""
    texts = [data.joined] if data.running else [d.strip() for d in data.documents if d.strip()]
    return torch.tensor(
        [token for ids in tokenizer(texts, verbose=False).input_ids for token in ids]
    )


def divide(tokens: Tensor, held_out: float) -> Parts:
    """Cut the last share off, half of it for tuning and half for reporting."""
    n = round(len(tokens) * held_out / 2)
    return Parts(tokens[: -2 * n], tokens[-2 * n : -n], tokens[-n:])


def new_model(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return an untrained Llama or OPT."""
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**options))
    return OPTForCausalLM(OPTConfig(**options))


def load_model(folder: str, device: torch.device, gguf_file: str | None = None) -> PreTrainedModel:
    """Return a pretrained model in float32."""
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).to(device)


def train(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    loss: str,
    lr: float,
    steps: int,
    batch: int,
    context: int,
    warmup: float,
    weight_decay: float,
    seed: int,
    log: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train in place on random windows; return time per step and the objective at the end.

    `log` is told the objective of every `LOG_EVERY`th step.
    """
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    set_loss(model, loss)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start, recent = clock(), []
    model.train()
    for step in range(steps):
        at = torch.randint(0, len(tokens) - context, (batch,), generator=generator)
        ids = tokens[at[:, None] + torch.arange(context)].to(device)
        value = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= int(0.9 * steps):
            recent.append(value.item())
        if log is not None and (step + 1) % LOG_EVERY == 0:
            log(step + 1, value.item())
    return {"objective": sum(recent) / len(recent), "ms_per_step": 1000 * (clock() - start) / steps}


def measure(model: PreTrainedModel, tokens: Tensor, *, context: int, limit: int) -> float:
    """Return the true perplexity of the first `limit` tokens."""
    ids = tokens[:limit].to(model.device)
    return perplexity(model, ids, context=context, batch_size=8).perplexity
