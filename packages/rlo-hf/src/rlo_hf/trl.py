"""TRL's `SFTTrainer` with the loss as an argument.

TRL's steps take per-token log-probabilities from a fused output layer and sum them. Here the
model that a step calls gives back, while training, `-link(-log p)` in the place of `log p`:
packing, masks, padding-free batches, accumulation and TRL's metrics all stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rlo_core._cross_entropy import apply_link
from rlo_core.errors import RLOError
from rlo_core.links import Link
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer as HostTrainer

from rlo_hf.conventions import (
    refuse_second_slot,
    refuse_sequence_parallel,
    smaller_is_better,
)
from rlo_hf.evaluation import EvalSums, ExactEvaluation
from rlo_hf.objective import Loss, Objective
from rlo_hf.schedule import ScheduleCallback
from rlo_hf.self_check import FirstStep, SelfCheck
from rlo_hf.tasks import base_of


class RootedSFTMixin(ExactEvaluation):
    """The slot, for any subclass of TRL's SFTTrainer; see `SFTTrainer`."""

    loss_objective: Objective
    _check: SelfCheck

    def open_slot(self, loss: Loss, *, check: bool = True) -> None:
        """Put the loss in an SFTTrainer that is made; arguments as `SFTTrainer`."""
        host = self._host
        refuse_second_slot(host.compute_loss_func)
        _refuse(host.args)
        refuse_sequence_parallel(host.accelerator, "use context parallelism")
        self.loss_objective = _with_link(loss)
        self._eval_sums = EvalSums("ce")
        self._check = SelfCheck(self.loss_objective, on=check)
        smaller_is_better(host)
        host.add_callback(ScheduleCallback(self.loss_objective))
        host.add_callback(FirstStep(host, self._check))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Do TRL's step; at the first batch, check the loss that it propagates."""
        if not self._check.pending:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        with self._check.watching(self._host, base_of(self._host.model), lambda logits: None):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

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
                if self._check.pending:
                    self._expect(outputs, num_items_in_batch)
                # Zero at ignored positions stays zero: every link is zero at zero.
                outputs.log_probs = -apply_link(-outputs.log_probs, link)
            else:
                self._eval_sums.pending = _rows(-outputs.log_probs, outputs.label_mask, link)
            return outputs

        linked.training = model.training  # type: ignore[attr-defined]
        return super().compute_loss(  # type: ignore[misc]
            linked, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _expect(self, outputs: Any, num_items_in_batch: Any) -> None:
        host, link = self._host, self.loss_objective.link
        assert link is not None
        total = link.value(-outputs.log_probs.detach().double()).sum()
        count, processes, extra = num_items_in_batch, 1, 0.0
        if count is None:
            count = outputs.label_mask.sum()
        elif host.args.average_tokens_across_devices:
            processes = host.accelerator.num_processes // host.get_tp_size()
        if host.aux_loss_enabled:
            steps = (
                host.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            )
            extra = host.router_aux_loss_coef * outputs.aux_loss.detach() / steps
        self._check.expect(total * processes, count, extra)


class SFTTrainer(RootedSFTMixin, HostTrainer):
    """TRL's SFTTrainer, trained on a rooted loss and evaluated in cross entropy.

    Args:
        model: As TRL's SFTTrainer, and so all arguments but the last two.
        loss: A spec, a criterion or its class; it must have a link, since TRL has log-probabilities
            and no logits at hand.
        check: As `rlo_hf.Trainer`.

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
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        *,
        loss: Loss = "rlo",
        check: bool = True,
    ) -> None:
        _with_link(loss)
        refuse_second_slot(compute_loss_func)
        _refuse(args)
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
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        self.open_slot(loss, check=check)


def _rows(ce: Tensor, mask: Tensor, link: Link) -> Tensor:
    """Return objective, count, ce, count of each row, (B, 4) float32."""
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
        raise RLOError(
            "class weights and label smoothing need logits, and the trainer works on "
            "log-probabilities"
        )
    return objective


def _refuse(args: Any) -> None:
    if getattr(args, "loss_type", "nll") == "dft":
        raise RLOError("loss_type='dft' and loss are the same slot; loss='dft' is that loss")
    if getattr(args, "label_smoothing_factor", 0.0):
        raise RLOError(
            "label_smoothing_factor needs logits, and the trainer works on log-probabilities; "
            "set it to 0"
        )
