"""TRL's trainers with the loss as an argument: `SFTTrainer`, and `DPOTrainer`, `KTOTrainer`,
`GRPOTrainer` and `ORPOTrainer`, which are imported when they are asked for.

TRL's steps take per-token log-probabilities from a fused output layer and sum them. Here that layer
is ours (see `rlo_hf.trl_head`) and what is summed is the objective: packing, masks, padding-free
batches, accumulation and TRL's metrics all stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rlo_core._cross_entropy import apply_link
from rlo_core.errors import RLOError
from rlo_core.linear.divergence import Layer
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer as HostTrainer
from trl.trainer.utils import add_fused_lm_head

from rlo_hf.conventions import (
    refuse_second_slot,
    refuse_sequence_parallel,
    smaller_is_better,
)
from rlo_hf.evaluation import EvalLoss, EvalSums, ExactEvaluation
from rlo_hf.linear_path import Linear
from rlo_hf.objective import Loss, Objective
from rlo_hf.reference import Reference
from rlo_hf.schedule import ScheduleCallback
from rlo_hf.self_check import FirstStep, SelfCheck
from rlo_hf.tasks import base_of, virtual_tokens
from rlo_hf.trl_head import HeadStep, kernel, layer_of, reason_against
from rlo_hf.weights import COLUMN, CallableGate, WeightCollator, WeightMean, Weights

if TYPE_CHECKING:
    from rlo_hf.trl_orpo import ORPOTrainer as ORPOTrainer
    from rlo_hf.trl_preference import DPOTrainer as DPOTrainer
    from rlo_hf.trl_preference import GRPOTrainer as GRPOTrainer
    from rlo_hf.trl_preference import KTOTrainer as KTOTrainer


class RootedSFTMixin(ExactEvaluation):
    """The slot, for any subclass of TRL's SFTTrainer; see `SFTTrainer`."""

    loss_objective: Objective
    linear_path: str
    _check: SelfCheck
    _callable: CallableGate | None
    _reference: Reference | None

    def open_slot(
        self,
        loss: Loss,
        *,
        check: bool = True,
        linear: Linear = "auto",
        eval_loss: EvalLoss = "ce",
        weight_mean: WeightMean = "weights",
        weights: Weights | None = None,
        reference_model: Any = None,
    ) -> None:
        """Put the loss in an SFTTrainer that is made; arguments as `SFTTrainer`."""
        host = self._host
        refuse_second_slot(host.compute_loss_func)
        _refuse(host.args)
        refuse_sequence_parallel(host.accelerator, "use context parallelism")
        if linear not in ("auto", "fused", "off"):
            raise ValueError(f"linear must be 'auto', 'fused' or 'off', got {linear!r}")
        if weight_mean not in ("weights", "tokens"):
            raise ValueError(f"weight_mean must be 'weights' or 'tokens', got {weight_mean!r}")
        self.loss_objective = _with_link(loss)
        self._callable = None if weights is None else CallableGate(weights)
        if self._callable is not None:
            self.loss_objective.add_gate(self._callable)
        reason = "linear='off'" if linear == "off" else reason_against(host.args)
        if reason is not None and linear == "fused":
            raise RLOError(f"linear='fused' is not possible: {reason}")
        self.linear_path = "fused" if reason is None else f"TRL's kernel ({reason})"
        self._fused = reason is None
        if not self._fused and self.loss_objective.gates:
            raise RLOError(f"a loss with gates needs the fused path, and {reason}")
        self._reference = None
        if self.loss_objective.terms or reference_model is not None:
            if not self._fused:
                raise RLOError(f"a loss with '+kl' needs the fused path, and {reason}")
            self._reference = Reference(self.loss_objective, reference_model, host)
            if reference_model is not None:
                add_fused_lm_head(reference_model)
        self.weight_mean = weight_mean
        if _has_column(host.train_dataset):
            if not self._fused:
                raise RLOError(f"{COLUMN} needs the fused path, and {reason}")
            if virtual_tokens(host.model):
                raise RLOError(f"{COLUMN} cannot be used with prompt tuning")
            host.data_collator = WeightCollator(host.data_collator)
        self._eval_sums = EvalSums(eval_loss)
        self._check = SelfCheck(self.loss_objective, on=check)
        smaller_is_better(host)
        host.add_callback(ScheduleCallback(self.loss_objective))
        host.add_callback(FirstStep(host, self._check))

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of weights, which is no argument of the model."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._host._signature_columns
        if columns is not None and COLUMN not in columns:
            self._host._signature_columns = [*columns, COLUMN]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count what the loss of an update is divided by, over its batches and processes."""
        weighted = any(COLUMN in batch for batch in batch_samples)
        if not weighted or self.weight_mean == "tokens":
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        host = self._host
        total = torch.stack([_token_weights(batch).sum().to(device) for batch in batch_samples])
        count = total.sum()
        if host.args.average_tokens_across_devices and host.args.world_size > 1:
            count = host.accelerator.gather(count).sum()
        if count == 0:
            raise RLOError(f"the sum of {COLUMN} over an update is 0; use weight_mean='tokens'")
        return count

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
        """Do TRL's step on the objective."""
        inputs = dict(inputs)
        weights = _token_weights(inputs) if inputs.get(COLUMN) is not None else None
        inputs.pop(COLUMN, None)
        training, pending = model.training, self._check.pending
        link = self.loss_objective.link
        assert link is not None
        if self._callable is not None:
            self._callable.batch = dict(inputs) if training else None

        def linked(*args: Any, **kwargs: Any) -> Any:
            expected: Tensor | None
            if not self._fused or not kwargs.get("fused_lm_head"):
                outputs = model(*args, **kwargs)
                if getattr(outputs, "log_probs", None) is None:
                    return outputs
                ce, mask = -outputs.log_probs, outputs.label_mask
                losses = link.value(ce.detach())
                expected = losses.double().sum()
                if training:
                    # Zero at ignored positions stays zero: every link is zero at zero.
                    outputs.log_probs = -apply_link(ce, link)
            else:
                step = HeadStep(
                    self.loss_objective,
                    weights if training else None,
                    training=training,
                    check=training and pending,
                    anchor=self._anchor(model, args, kwargs) if training else None,
                )
                with kernel(step.apply):
                    outputs = model(*args, **kwargs)
                assert step.rows is not None
                ce, mask = step.rows.ce, outputs.label_mask
                expected = step.expected
                if not training:
                    empty = torch.zeros(mask.shape, dtype=ce.dtype, device=ce.device)
                    losses = empty.masked_scatter(mask, step.losses())
                    ce = empty.masked_scatter(mask, ce)
            if training and pending:
                self._expect(outputs, expected, num_items_in_batch, weights)
            elif not training:
                self._eval_sums.pending = _rows(losses, ce, mask)
            return outputs

        linked.training = training  # type: ignore[attr-defined]
        return super().compute_loss(  # type: ignore[misc]
            linked, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _anchor(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Layer | None:
        if self._reference is None:
            return None
        rest = {key: value for key, value in kwargs.items() if key != "output_router_logits"}
        with self._reference.standing(model) as reference:
            return layer_of(lambda: reference(*args, **rest))

    def _expect(
        self, outputs: Any, total: Any, num_items_in_batch: Any, weights: Tensor | None
    ) -> None:
        host = self._host
        count, processes, extra = num_items_in_batch, 1, 0.0
        if count is None:
            count = outputs.label_mask.sum()
        elif host.args.average_tokens_across_devices:
            processes = host.accelerator.num_processes // host.get_tp_size()
        if host.aux_loss_enabled:
            counted = num_items_in_batch is not None
            steps = host.current_gradient_accumulation_steps if counted else 1
            extra = host.router_aux_loss_coef * outputs.aux_loss.detach() / steps
        self._check.expect(total * processes, count, extra)


def _token_weights(batch: Any) -> Tensor:
    """Return the weight of each label that is not ignored, after the shift, in order."""
    if "shift_labels" in batch:
        raise RLOError(f"{COLUMN} cannot be used with labels that are shifted already")
    labels, weights = batch["labels"], batch[COLUMN]
    if weights.dim() < labels.dim():
        weights = weights.unsqueeze(1).expand(labels.shape)
    found: Tensor = weights[:, 1:][labels[:, 1:] != -100]
    return found


def _has_column(dataset: Any) -> bool:
    return COLUMN in (getattr(dataset, "column_names", None) or ())


class SFTTrainer(RootedSFTMixin, HostTrainer):
    """TRL's SFTTrainer, trained on a rooted loss and evaluated in cross entropy.

    Args:
        model: As TRL's SFTTrainer, and so all arguments but those below.
        loss: A spec, a criterion or its class; it must have a link, since TRL has log-probabilities
            and no logits at hand.
        check: As `rlo_hf.Trainer`.
        linear: "auto" computes TRL's fused output layer by ours where that is possible, "fused"
            raises where it is not, "off" keeps TRL's. `trainer.linear_path` says which runs.
        eval_loss: Whether `eval_loss` is "ce" or the "objective"; both have names of their own.
        weight_mean: As `rlo_hf.Trainer`, for a column `loss_weight`.
        weights: As `rlo_hf.Trainer`.
        reference_model: As `rlo_hf.Trainer`, for a loss with `+kl`.

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
        linear: Linear = "auto",
        eval_loss: EvalLoss = "ce",
        weight_mean: WeightMean = "weights",
        weights: Weights | None = None,
        reference_model: Any = None,
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
        if _has_column(train_dataset) and not _has_column(self.train_dataset):
            raise RLOError(
                f"TRL's preparation of the data has dropped {COLUMN}; give a tokenized data set "
                "with a list of weights for each row, without packing"
            )
        self.open_slot(
            loss,
            check=check,
            linear=linear,
            eval_loss=eval_loss,
            weight_mean=weight_mean,
            weights=weights,
            reference_model=reference_model,
        )


def _rows(losses: Tensor, ce: Tensor, mask: Tensor) -> Tensor:
    """Return objective, count, ce, count of each row, (B, 4) float32."""
    objective = losses.detach().double().where(mask, 0.0).sum(1)
    count = mask.sum(1).double()
    return torch.stack([objective, count, ce.detach().double().sum(1), count], dim=1).float()


def _with_link(loss: Loss) -> Objective:
    objective = Objective(loss, anchored=True)
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


__all__ = [
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "RootedSFTMixin",
    "SFTTrainer",
]
_HOME = {
    "DPOSlot": "rlo_hf.trl_preference",
    "DPOTrainer": "rlo_hf.trl_preference",
    "GRPOTrainer": "rlo_hf.trl_preference",
    "KTOSlot": "rlo_hf.trl_preference",
    "KTOTrainer": "rlo_hf.trl_preference",
    "ORPOSlot": "rlo_hf.trl_orpo",
    "ORPOTrainer": "rlo_hf.trl_orpo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlo_hf.trl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
