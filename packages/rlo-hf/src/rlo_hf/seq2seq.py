"""`Seq2SeqTrainer(loss="rlo")`: the encoder-decoder trainer, whose evaluation may generate."""

from __future__ import annotations

from typing import Any, cast

import transformers
from torch import nn

from rlo_hf.trainer import RootedLossMixin
from rlo_hf.weights import COLUMN


class RootedSeq2SeqMixin(RootedLossMixin):
    """The slot, for any subclass of transformers' Seq2SeqTrainer."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        """As `Trainer`, with `predict_with_generate` too, where the host takes the model's loss."""
        inputs = {key: value for key, value in inputs.items() if key != COLUMN}
        if not self._host.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

        def observed(**batch: Any) -> Any:
            outputs = model(**batch)
            if batch.get("labels") is not None:
                target = self.loss_objective.canonical(batch["labels"])
                self._eval_sums.pending = self.loss_objective.rows(outputs["logits"], target)
            return outputs

        return super().prediction_step(
            cast("nn.Module", observed), inputs, prediction_loss_only, ignore_keys, **gen_kwargs
        )


class Seq2SeqTrainer(RootedSeq2SeqMixin, transformers.Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with the loss as an argument; see `rlo_hf.trainer.Trainer`."""
