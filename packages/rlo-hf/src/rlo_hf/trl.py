"""TRL's `SFTTrainer` with the loss as an argument.

TRL's steps take per-token log-probabilities from a fused output layer and sum them. Here the
model that a step calls gives back, while training, `-link(-log p)` in the place of `log p`:
packing, masks, padding-free batches, accumulation and TRL's metrics all stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from rlo_core.errors import RLOError
from rlo_core.functional import apply_link
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer as HostTrainer

from rlo_hf.evaluation import EvalSums
from rlo_hf.objective import Loss, Objective
from rlo_hf.schedule import ScheduleCallback


class SFTTrainer(HostTrainer):
    """TRL's SFTTrainer, trained on a rooted loss and evaluated in cross entropy.

    Args:
        model: As TRL's SFTTrainer, and so all arguments but the last.
        loss: A spec, a criterion or its class; it must have a link, since TRL has log-probabilities
            and no logits at hand.

    Raises:
        RLOError: a loss without a link or with class weights or smoothing; `loss_type="dft"` or
            `label_smoothing_factor` beside it; DeepSpeed sequence parallelism.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        *,
        loss: Loss = "rlo",
    ) -> None:
        self.loss_objective = _with_link(loss)
        _refuse(args, compute_loss_func)
        self._eval_sums = EvalSums("ce")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.sp_backend == "deepspeed" and parallel.sp_enabled:
            raise RLOError(
                "DeepSpeed sequence parallelism takes the model's own loss, not this one"
            )
        self.add_callback(ScheduleCallback(self.loss_objective))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Do TRL's step on the linked log-probabilities."""

        def linked(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            if getattr(outputs, "log_probs", None) is None:
                return outputs
            link = self.loss_objective.link
            assert link is not None
            if model.training:
                # Zero at ignored positions stays zero: every link is zero at zero.
                outputs.log_probs = -apply_link(-outputs.log_probs, link)
            else:
                self._eval_sums.pending = _rows(-outputs.log_probs, outputs.label_mask, link)
            return outputs

        linked.training = model.training  # type: ignore[attr-defined]
        return super().compute_loss(  # type: ignore[no-untyped-call]
            linked, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Do TRL's step, and add its rows to the sums of the evaluation."""
        self._eval_sums.pending = None
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._eval_sums.gather(self.accelerator)
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run the loop; `loss`, `ce` and `perplexity` are those of ce, exact over all tokens."""
        self._eval_sums.reset()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        cast("dict[str, float]", output.metrics).update(self._eval_sums.metrics(metric_key_prefix))
        return output


def _rows(ce: Any, mask: Any, link: Any) -> Any:
    """Return objective, count, ce, count of each row, (B, 4) float32."""
    import torch

    ce = ce.detach().double()
    objective = apply_link(ce, link).where(mask, 0.0).sum(1)
    count = mask.sum(1).double()
    return torch.stack([objective, count, ce.sum(1), count], dim=1).float()


def _with_link(loss: Loss) -> Objective:
    objective = Objective(loss)
    if objective.link is None:
        raise RLOError(
            f"loss {objective.name!r} has no link; TRL has per-token log-probabilities only, so it "
            "must be a function of cross entropy"
        )
    if objective.weight is not None or objective.label_smoothing:
        raise RLOError("class weights and label smoothing need logits, which TRL does not build")
    return objective


def _refuse(args: Any, compute_loss_func: Any) -> None:
    if compute_loss_func is not None:
        raise RLOError("compute_loss_func and loss are the same slot; give one of them")
    if getattr(args, "loss_type", "nll") == "dft":
        raise RLOError("loss_type='dft' and loss are the same slot; loss='dft' is that loss")
    if getattr(args, "label_smoothing_factor", 0.0):
        raise RLOError("label_smoothing_factor needs logits, which TRL does not build; set it to 0")
