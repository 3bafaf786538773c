"""Finetuning in a comparison of losses: one run at a time, measured on held-out tokens."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rlo_core.compare.measures import Held
from rlo_core.compare.task import DivergedError, Task
from rlo_core.lm.tokens import window_length
from rlo_core.registry import create_loss
from torch import Tensor

from rlo_hf.finetuning.adapters import check_adapters
from rlo_hf.finetuning.options import FinetuneOptions
from rlo_hf.finetuning.run import finetune

RATES = (1e-5, 3e-5, 1e-4, 3e-4)
TEMPERATURES = tuple(2.0 ** (j / 4) for j in range(-4, 9))
"""From 1/2 to 4: a vocabulary is too wide for a fine grid."""
_SAME = ("loss", "out", "learning_rate", "seed")


class HFTask(Task):
    """A model and a text under one recipe.

    Args:
        options: The recipe; its loss, rate and seed are the comparison's.
        rates: Peak learning rates; None for `RATES`.
    """

    host: ClassVar[str] = "hf"

    def __init__(self, options: FinetuneOptions, *, rates: tuple[float, ...] | None = None) -> None:
        self.options = options
        self.rates = tuple(sorted(rates or RATES))
        self.default = len(self.rates) // 2
        self.criterion = "likelihood"
        check_adapters(options)

    def describe(self) -> dict[str, Any]:
        recipe = {k: v for k, v in asdict(self.options).items() if k not in _SAME}
        return {"data": [self.options.dataset], "recipe": recipe}

    def check(self, loss: str) -> None:
        create_loss(loss)

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        held = Held(TEMPERATURES)

        def inspect(model: Any, ids: Tensor) -> None:
            feed(held, model, ids, window_length(model.config, self.options.eval_context))

        with tempfile.TemporaryDirectory() as scratch:
            options = replace(
                self.options,
                loss=loss,
                learning_rate=rate,
                seed=seed,
                out=str(Path(scratch) / "run"),
            )
            result = finetune(options, inspect=inspect)
        if result.ce_after is None or not math.isfinite(result.ce_after):
            raise DivergedError(f"{loss} at {rate:g} diverged")
        return {**held.result(), "perplexity": result.perplexity_after}

    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        options = replace(self.options, loss=loss, learning_rate=rate, out=str(out))
        return finetune(options, save=out / "model").summary()


@torch.no_grad()
def feed(held: Held, model: Any, ids: Tensor, context: int) -> None:
    """Add every predicted token of windows of `context` tokens, as perplexity counts them."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    count = max(1, len(ids) // context)
    for start in range(0, count * context, context):
        window = ids[start : start + context].to(device)
        logits = model(window[None]).logits[0, :-1].float()
        held.update(logits, window[1:])
    model.train(training)
