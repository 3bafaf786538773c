"""`Trainer(loss="rlo")`: transformers' Trainer with one more argument, for every task with labels.

Everything else is the Trainer's own: this fills its loss slot, counts what the loss is divided by,
and reports cross entropy and perplexity beside the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from rlo_core.errors import RLOError
from rlo_core.linear.divergence import Layer
from torch import Tensor, nn

from rlo_hf.conventions import (
    add_decoder_inputs,
    aligned,
    matched,
    refuse_hosts,
    refuse_second_slot,
    router_loss,
    smaller_is_better,
    smoothing_of,
)
from rlo_hf.evaluation import EvalLoss, EvalSums, ExactEvaluation
from rlo_hf.head import logits_of
from rlo_hf.linear_path import Linear, LinearPath
from rlo_hf.objective import IGNORE_INDEX, Loss, Objective
from rlo_hf.reference import Reference, term_total
from rlo_hf.schedule import ScheduleCallback
from rlo_hf.self_check import FirstStep, SelfCheck, overrides, reference_total
from rlo_hf.tasks import Task, base_of, config_of, task_of, virtual_tokens
from rlo_hf.weights import (
    COLUMN,
    CallableGate,
    WeightCollator,
    WeightMean,
    Weights,
    aligned_weights,
    has_weights,
)


class RootedLossMixin(ExactEvaluation):
    """The slot, for any subclass of transformers' Trainer; see `Trainer`."""

    loss_objective: Objective
    task: Task
    _path: LinearPath
    _check: SelfCheck
    _targets: Tensor | None
    _weights: Tensor | None
    _callable: CallableGate | None
    _trusted: bool
    _reference: Reference | None
    _anchor: Layer | None

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        loss: Loss = "rlo",
        task: Task | None = None,
        linear: Linear = "auto",
        eval_loss: EvalLoss = "objective",
        check: bool = True,
        weights: Weights | None = None,
        weight_mean: WeightMean = "weights",
        reference_model: Any = None,
    ) -> None:
        refuse_second_slot(compute_loss_func)
        more: dict[str, Any] = {}
        if optimizer_cls_and_kwargs is not None:  # Seq2SeqTrainer does not take it
            more["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs
        super().__init__(
            model=model,  # type: ignore[call-arg]
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **more,
        )
        self.open_slot(
            loss,
            task=task,
            linear=linear,
            eval_loss=eval_loss,
            check=check,
            weights=weights,
            weight_mean=weight_mean,
            reference_model=reference_model,
        )

    def open_slot(
        self,
        loss: Loss,
        *,
        task: Task | None = None,
        linear: Linear = "auto",
        eval_loss: EvalLoss = "objective",
        check: bool = True,
        weights: Weights | None = None,
        weight_mean: WeightMean = "weights",
        reference_model: Any = None,
    ) -> None:
        """Put the loss in a Trainer that is made; arguments as `Trainer`."""
        host = self._host
        refuse_second_slot(host.compute_loss_func)
        refuse_hosts(host)
        smoothing = smoothing_of(host)
        self.loss_objective = Objective(loss, label_smoothing=smoothing, anchored=True)
        if isinstance(self.loss_objective.criterion, nn.Module):
            self.loss_objective.criterion.to(host.args.device)
        self._callable = None if weights is None else CallableGate(weights)
        if self._callable is not None:
            self.loss_objective.add_gate(self._callable)
        if weight_mean not in ("weights", "tokens"):
            raise ValueError(f"weight_mean must be 'weights' or 'tokens', got {weight_mean!r}")
        self.weight_mean = weight_mean
        if has_weights(host.train_dataset) or has_weights(host.eval_dataset):
            host.data_collator = WeightCollator(host.data_collator)
        self.task = task if task is not None else task_of(host.model)
        if not host.label_names:  # a forward whose signature does not show its labels
            host.label_names = ["labels"]
        if len(host.label_names) != 1:
            raise RLOError(f"label_names must be one name, got {host.label_names}")
        self._reference = self._anchor = None
        if self.loss_objective.terms or reference_model is not None:
            if self.task != "causal":
                raise RLOError(f"a loss with '+kl' needs a causal language model, got {self.task}")
            self._reference = Reference(self.loss_objective, reference_model, host)
        self._path = LinearPath(linear, self.loss_objective, self.task)
        self._eval_sums = EvalSums(eval_loss)
        self._targets = self._weights = None
        self._check = SelfCheck(self.loss_objective, on=check)
        # A step of others below ours may not come to our slot: not without logits before the check.
        self._trusted = not overrides(type(self), after=RootedLossMixin)
        smaller_is_better(host)
        # Not None: the Trainer then counts labels and leaves gradient accumulation to the loss.
        host.compute_loss_func = self._slot
        # The labels that `_get_num_items_in_batch` hands on are shifted already.
        host._loss_shifts_labels = False
        host.add_callback(ScheduleCallback(self.loss_objective))
        host.add_callback(FirstStep(host, self._check))

    @property
    def linear_path(self) -> str:
        """The path that training takes, "fused" or "logits (REASON)"; empty before it starts."""
        return self._path.name

    def _aligned(self, inputs: Mapping[str, Any]) -> Tensor:
        host = self._host
        return aligned(
            inputs,
            host.label_names[0],
            self.task,
            self.loss_objective,
            config_of(host.model),
            prompted=virtual_tokens(host.model) > 0,
        )

    def _aligned_weights(self, inputs: Mapping[str, Any], target: Tensor) -> Tensor | None:
        prompted = virtual_tokens(self._host.model) > 0
        return aligned_weights(inputs, target, self.task, prompted=prompted)

    def _count(self, target: Tensor, weights: Tensor | None) -> Tensor:
        """What the mean of these labels divides by."""
        return self.loss_objective.count(target, weights if self.weight_mean == "weights" else None)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of weights, which is no argument of the model."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._host._signature_columns
        if columns is not None and COLUMN not in columns:
            self._host._signature_columns = [*columns, COLUMN]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count what the loss of an update is divided by, over its batches and processes."""
        host = self._host
        if not batch_samples or host.label_names[0] not in batch_samples[0]:
            return None
        targets = [self._aligned(batch) for batch in batch_samples]
        weights = [
            self._aligned_weights(batch, target)
            for batch, target in zip(batch_samples, targets, strict=True)
        ]
        if self.loss_objective.weight is None and all(w is None for w in weights):
            counted = [{"labels": target} for target in targets]
            return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]
        counts = [self._count(t, w).to(device) for t, w in zip(targets, weights, strict=True)]
        total = torch.stack(counts).sum()
        if host.args.average_tokens_across_devices and host.args.world_size > 1:
            total = host.accelerator.gather(total).sum()
        return total

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do the Trainer's step; at the first batch, check the loss that it propagates."""

        def step() -> Tensor:
            return super(RootedLossMixin, self).training_step(  # type: ignore[misc, no-any-return]
                model, inputs, num_items_in_batch
            )

        if not self._check.pending:
            return step()
        name = self._host.label_names[0]
        target = self._aligned(inputs) if inputs.get(name) is not None else None
        weights = None if target is None else self._aligned_weights(inputs, target)

        def expected(logits: Tensor) -> Tensor | None:
            if target is None:
                return None
            try:
                scores = matched(logits, target, self.task)
            except RLOError:
                return None
            total = reference_total(self.loss_objective, scores, target.to(scores.device), weights)
            total = total + self._terms_of(scores, target)
            count = self._count(target, weights)
            if num_items_in_batch is not None:
                count = torch.as_tensor(num_items_in_batch)
            count = count.to(total.device)
            return total / count.where(count != 0, 1) * self._processes(num_items_in_batch)

        with self._check.watching(self._host, base_of(model), expected):
            loss = step()
        self._trusted = True
        return loss

    def _processes(self, num_items_in_batch: Any) -> int:
        """What the Trainer multiplies a loss by that is divided by the labels of all processes."""
        host = self._host
        if num_items_in_batch is None or not host.args.average_tokens_across_devices:
            return 1
        return int(host.accelerator.num_processes // host.get_tp_size())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the rooted loss of a batch, scaled as the Trainer expects it."""
        base = base_of(model)
        inputs = dict(inputs)
        inputs.pop("skip_logits", None)  # what the Trainer adds for Liger's forward
        name = self._host.label_names[0]
        if inputs.get(name) is None:
            raise RLOError(f"a batch has no {name!r}; it has {', '.join(inputs)}")
        self._targets = self._aligned(inputs)
        self._weights = self._aligned_weights(inputs, self._targets)
        inputs.pop(COLUMN, None)
        if self._callable is not None:
            self._callable.batch = dict(inputs) if model.training else None
        inputs.pop("shift_labels", None)
        if name != "labels":
            inputs["labels"] = inputs.pop(name)
        if self.task == "seq2seq":
            add_decoder_inputs(base, inputs)
        checked = model.training and self._check.pending
        fused = model.training and not return_outputs and self._trusted
        if fused:
            self._path.decide(base, self._host)
            self._path.keep = checked
        if self._reference is not None and model.training:
            self._anchor = self._reference.layer(model, inputs, self._targets)
        taken = self._path.taken(self._targets, self._weights, self._anchor)
        with taken if fused else nullcontext():
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            counted = num_items_in_batch is not None
            steps = self._host.current_gradient_accumulation_steps if counted else 1
            router = router_loss(base, outputs) / steps
            if checked and isinstance(outputs, (Mapping, tuple)):
                self._expect(outputs, num_items_in_batch, router)
            loss = loss + router
        elif isinstance(outputs, tuple):
            outputs = (loss, *outputs)  # prediction_step takes the first of a tuple for the loss
        self._targets = self._weights = self._path.total = self._path.seen = self._anchor = None
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _expect(self, outputs: Any, num_items_in_batch: Any, router: Tensor | float) -> None:
        """Tell the check what the loss should be, by the formula and from the same outputs."""
        target = self._targets
        assert target is not None
        if self._path.seen is not None:
            head, hidden = self._path.seen
            rows, labels = matched(hidden, target, self.task).flatten(0, -2), target.flatten()
            total = reference_total(
                self.loss_objective,
                lambda start, stop: logits_of(head, rows[start:stop]),
                labels.to(rows.device),
                self._weights,
            )
            if self._anchor is not None:
                kept = rows[(labels != IGNORE_INDEX).to(rows.device)]
                total = total + self._terms(lambda start, stop: logits_of(head, kept[start:stop]))
        else:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            logits = matched(logits, target, self.task)
            target = target.to(logits.device)
            total = reference_total(self.loss_objective, logits, target, self._weights)
            total = total + self._terms_of(logits, target)
        count = num_items_in_batch
        if count is None:
            count = self._count(target, self._weights)
        total = total * self._processes(num_items_in_batch)
        self._check.expect(total, count, torch.as_tensor(router).detach())

    def _terms(self, logits: Callable[[int, int], Tensor]) -> Tensor:
        """The terms of the loss, from the logits of the kept labels."""
        target, weights = self._targets, self._weights
        assert target is not None
        assert self._anchor is not None
        share = None if weights is None else weights[target != IGNORE_INDEX]
        return term_total(self.loss_objective.terms, logits, self._anchor, share)

    def _terms_of(self, logits: Tensor, target: Tensor) -> Tensor | float:
        """The terms of the loss, 0 for one without, from all logits."""
        if self._anchor is None:
            return 0.0
        kept = logits[(target != IGNORE_INDEX).to(logits.device)]
        return self._terms(lambda start, stop: kept[start:stop])

    def _slot(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What the Trainer calls as `compute_loss_func`: the sum over labels by their count."""
        target, total = self._targets, self._path.total
        assert target is not None
        if total is None:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            logits = matched(logits, target, self.task)
            target = target.to(logits.device)
            if not base_of(self._host.model).training:
                rows = self.loss_objective.rows(logits, target)
                self._eval_sums.pending = rows
                return rows[:, 0].sum() / rows[:, 1].sum().clamp(min=1)
            if target.is_floating_point():
                total = self.loss_objective.binary_total(logits, target)
            else:
                share = None if self._weights is None else self._weights.flatten()
                rows = logits.flatten(0, -2)
                total = self.loss_objective.total(rows, target.flatten(), weights=share)
                total = total + self._terms_of(logits, target)
        count = num_items_in_batch
        if count is None:
            count = self._count(target, self._weights)
        count = torch.as_tensor(count, device=total.device)
        # A batch without any label trains on nothing, as a zero and not as 0/0.
        return total / count.where(count != 0, 1)


class Trainer(RootedLossMixin, transformers.Trainer):
    """transformers' Trainer with the loss as an argument.

    The total gradient of an update is that of the mean over all kept labels of all its batches,
    under any gradient accumulation and number of processes. `evaluate()` adds `eval_ce` and
    `eval_perplexity` = exp(mean token ce), exact over batches of any lengths.

    Args:
        model: As transformers' Trainer, and so all arguments up to the last four.
        loss: `"rlo:k=5,m=5"`, a criterion, its class, or a callable; see
            `rlo_hf.objective.Objective`.
        task: "causal", "seq2seq", "token" or "sequence"; found from the model's class if left out.
        linear: "auto" computes a causal LM's loss from the hidden states without the logits where
            that is possible, "fused" raises where it is not, "off" never does.
            `trainer.linear_path` says which path runs, and why.
        eval_loss: Whether `eval_loss` is the "objective" or "ce"; both are reported under their own
            names in either case.
        check: Whether the first training batch is checked: the loss that is propagated must be the
            objective of its outputs, else the run stops with the file and line of what is in its
            place.
        weights: A function of a batch and the statistics of its kept labels
            (`rlo_core.gates.RowStatistics`: ce, p, entropy, top1) that returns the weight of each,
            without gradient, in training. The mean does not divide by these.
        weight_mean: Whether the mean divides by the sum of the `loss_weight` column over the kept
            labels ("weights") or by their number ("tokens").
        reference_model: For a causal LM and a loss with `+kl`: the model whose distribution it is
            held to (a copy of the start, a teacher with the same vocabulary). None for the trained
            model without its adapters.

    A column `loss_weight` of the data, a number for a row or a list with one for each token, weighs
    the training loss; evaluation leaves it out.

    Raises:
        RLOError: question answering, regression, `nn.DataParallel`, DeepSpeed sequence parallelism,
            and whatever else the loss slot does not reach; each message says the way out.
    """
