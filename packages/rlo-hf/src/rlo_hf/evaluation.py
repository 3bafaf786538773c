"""Token-exact evaluation: sums over rows, gathered over processes, divided once at the end.

The Trainer's own `eval_loss` is a mean of per-batch means, so it moves with the batch size, and exp
of it is a perplexity only for cross entropy and batches of equal token counts.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlo_hf.objective import Objective
from rlo_hf.schedule import scheduled

EvalLoss = Literal["objective", "ce"]


class EvalSums:
    """Sums over an evaluation: objective, its count, cross entropy, tokens.

    Args:
        eval_loss: What `eval_loss` is: the objective that is trained, or cross entropy.
    """

    def __init__(self, eval_loss: EvalLoss) -> None:
        if eval_loss not in ("objective", "ce"):
            raise ValueError(f"eval_loss must be 'objective' or 'ce', got {eval_loss!r}")
        self.eval_loss = eval_loss
        self.pending: Tensor | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    def reset(self) -> None:
        """Begin an evaluation."""
        self.pending = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    def gather(self, accelerator: Any) -> None:
        """Add the pending rows of every process, those left out that only fill the last batch."""
        if self.pending is None:
            return
        rows = accelerator.pad_across_processes(self.pending, dim=0, pad_index=0)
        rows = accelerator.gather_for_metrics(rows)
        self._sums += rows.double().sum(0).cpu()
        self.pending = None

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return `loss`, `objective`, `ce`, `perplexity` under a prefix; nothing without labels."""
        objective, count, ce, tokens = self._sums.tolist()
        if tokens == 0:
            return {}
        mean, mean_ce = objective / count, ce / tokens
        return {
            f"{prefix}_loss": mean if self.eval_loss == "objective" else mean_ce,
            f"{prefix}_objective": mean,
            f"{prefix}_ce": mean_ce,
            f"{prefix}_perplexity": math.exp(mean_ce) if mean_ce < 700 else math.inf,
        }


class ExactEvaluation:
    """Puts the token-exact figures into the evaluations of a subclass of transformers' Trainer.

    The subclass leaves the rows of a batch in `_eval_sums.pending` while it evaluates.
    """

    _eval_sums: EvalSums
    loss_objective: Objective

    @property
    def _host(self) -> Any:
        return self

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer does, and the k that a schedule has arrived at beside the loss."""
        if "loss" in logs:
            logs = {**logs, **scheduled(self.loss_objective)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        """Do the Trainer's step, and add its rows to the sums of the evaluation."""
        self._eval_sums.pending = None
        result = super().prediction_step(  # type: ignore[misc]
            model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs
        )
        self._eval_sums.gather(self._host.accelerator)
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run the Trainer's loop, then put the exact figures in the place of its loss."""
        self._eval_sums.reset()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        output.metrics.update(self._eval_sums.metrics(metric_key_prefix))
        return output
