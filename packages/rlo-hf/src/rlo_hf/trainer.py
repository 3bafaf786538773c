"""`Trainer(loss="rlo")`: transformers' Trainer with one more argument, for every task with labels.

Everything else is the Trainer's own: this fills its loss slot, counts what the loss is divided by,
and reports cross entropy and perplexity beside the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
import transformers
from rlo_core.errors import RLOError
from torch import Tensor, nn
from transformers.utils import logging

from rlo_hf.conventions import add_decoder_inputs, matched, refuse_hosts, smoothing_of
from rlo_hf.evaluation import EvalLoss, EvalSums
from rlo_hf.head import Head, HeadError, autocast_pair, replaced, separate
from rlo_hf.objective import Loss, Objective
from rlo_hf.schedule import ScheduleCallback
from rlo_hf.tasks import Task, base_of, is_multi_label, shifted, task_of

logger = logging.get_logger(__name__)
Linear = Literal["auto", "fused", "off"]


class RootedLossMixin:
    """The slot, for any subclass of transformers' Trainer; see `Trainer`."""

    loss_objective: Objective
    task: Task
    linear: Linear
    linear_path: str
    _eval_sums: EvalSums
    _head: Head | None
    _targets: Tensor | None
    _fused_total: Tensor | None

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
    ) -> None:
        if compute_loss_func is not None:
            raise RLOError("compute_loss_func and loss are the same slot; give one of them")
        if linear not in ("auto", "fused", "off"):
            raise ValueError(f"linear must be 'auto', 'fused' or 'off', got {linear!r}")
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
        host = self._host
        refuse_hosts(host)
        smoothing = smoothing_of(host)
        self.loss_objective = Objective(loss, label_smoothing=smoothing)
        if isinstance(self.loss_objective.criterion, nn.Module):
            self.loss_objective.criterion.to(host.args.device)
        self.task = task if task is not None else task_of(host.model)
        if not host.label_names:  # a forward whose signature does not show its labels
            host.label_names = ["labels"]
        if len(host.label_names) != 1:
            raise RLOError(f"label_names must be one name, got {host.label_names}")
        self.linear = linear
        self.linear_path = ""
        self._head = None
        self._eval_sums = EvalSums(eval_loss)
        self._targets = None
        self._fused_total = None
        # Not None: the Trainer then counts labels and leaves gradient accumulation to the loss.
        host.compute_loss_func = self._slot
        # The labels that `_get_num_items_in_batch` hands on are shifted already.
        host._loss_shifts_labels = False
        host.add_callback(ScheduleCallback(self.loss_objective))

    @property
    def _host(self) -> Any:
        return self

    # --- what the loss is divided by

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        host = self._host
        name = host.label_names[0]
        if not batch_samples or name not in batch_samples[0]:
            return None
        targets = [self._aligned(batch) for batch in batch_samples]
        if self.loss_objective.weight is None:
            counted = [{"labels": target} for target in targets]
            return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]
        total = torch.stack([self.loss_objective.count(t).to(device) for t in targets]).sum()
        if host.args.average_tokens_across_devices and host.args.world_size > 1:
            total = host.accelerator.gather(total).sum()
        return total

    def _aligned(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the labels in the places of the predictions."""
        host = self._host
        if "shift_labels" in inputs and self.task == "causal":
            return self.loss_objective.canonical(inputs["shift_labels"])
        labels: Tensor = inputs[host.label_names[0]]
        if self.task == "sequence" and is_multi_label(base_of(host.model).config, labels):
            return labels.float()
        if labels.is_floating_point():
            raise RLOError(
                f"labels of a {self.task} task must be integers, got {labels.dtype}; set "
                "problem_type='multi_label_classification' in the model's config for multi-label"
            )
        labels = self.loss_objective.canonical(labels)
        return shifted(labels) if self.task == "causal" else labels

    # --- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the rooted loss of a batch, scaled as the Trainer expects it."""
        host = self._host
        base = base_of(model)
        inputs = dict(inputs)
        inputs.pop("skip_logits", None)  # what the Trainer adds for Liger's forward
        name = host.label_names[0]
        if inputs.get(name) is None:
            raise RLOError(f"a batch has no {name!r}; it has {', '.join(inputs)}")
        self._targets = self._aligned(inputs)
        inputs.pop("shift_labels", None)
        if name != "labels":
            inputs["labels"] = inputs.pop(name)
        if self.task == "seq2seq":
            add_decoder_inputs(base, inputs)
        head = self._fused_head(base) if model.training and not return_outputs else None
        self._fused_total = None
        with nullcontext() if head is None else replaced(head.linear, self._fused(head)):
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            loss = loss + self._router_loss(base, outputs, num_items_in_batch)
        elif not isinstance(outputs, Mapping):
            outputs = (loss, *outputs)  # prediction_step takes the first of a tuple for the loss
        self._targets = self._fused_total = None
        return (loss, outputs) if return_outputs else loss

    def _slot(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What the Trainer calls as `compute_loss_func`: the sum over labels by their count."""
        host = self._host
        target = self._targets
        assert target is not None
        if self._fused_total is not None:
            total = self._fused_total
        else:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            logits = matched(logits, target, self.task)
            target = target.to(logits.device)
            if not base_of(host.model).training:
                rows = self.loss_objective.rows(logits, target)
                self._eval_sums.pending = rows
                return rows[:, 0].sum() / rows[:, 1].sum().clamp(min=1)
            if target.is_floating_point():
                total = self.loss_objective.binary_total(logits, target)
            else:
                total = self.loss_objective.total(logits.flatten(0, -2), target.flatten())
        count = num_items_in_batch
        if count is None:
            count = self.loss_objective.count(target)
        count = torch.as_tensor(count, device=total.device)
        # A batch without any label trains on nothing, as a zero and not as 0/0.
        return total / count.clamp(min=torch.finfo(torch.float32).tiny)

    def _router_loss(self, base: nn.Module, outputs: Any, num_items: Any) -> Tensor | float:
        """Return a mixture-of-experts model's balancing loss; it adds that only if given labels."""
        host = self._host
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if not isinstance(auxiliary, Tensor):
            return 0.0
        config: Any = base.config
        weight = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)
        steps = host.current_gradient_accumulation_steps if num_items is not None else 1
        return weight * auxiliary / steps

    # --- the fused linear path

    def _fused(self, head: Head) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            from rlo_core.linear import link_linear_cross_entropy

            link, target = self.loss_objective.link, self._targets
            assert link is not None
            assert target is not None
            batch, length = hidden.shape[:2]
            hidden = matched(hidden, target, self.task)
            states, weight, bias = autocast_pair(hidden * head.scale, head.linear)
            total = link_linear_cross_entropy(
                states.flatten(0, -2),
                weight,
                target.to(hidden.device).flatten(),
                link,
                bias=bias,
                label_smoothing=self.loss_objective.label_smoothing,
                softcap=head.softcap,
                reduction="sum",
            )
            self._fused_total = total
            # In the place of the logits: DDP finds the parameters that were used through the
            # outputs.
            return total.expand(batch, length, 1).clone()

        return forward

    def _fused_head(self, base: nn.Module) -> Head | None:
        if not self.linear_path:
            reason = self._why_not_fused()
            if reason is None:
                try:
                    self._head = separate(base)
                except HeadError as error:
                    reason = str(error)
            if reason is not None and self.linear == "fused":
                raise RLOError(
                    f"linear='fused' is not possible for {type(base).__name__}: {reason}"
                )
            self.linear_path = "fused" if reason is None else f"logits ({reason})"
            if self._host.is_world_process_zero():
                logger.warning(f"loss {self.loss_objective.name}, linear path: {self.linear_path}")
        return self._head

    def _why_not_fused(self) -> str | None:
        host = self._host
        if self.linear == "off":
            return "linear='off'"
        if self.task != "causal":
            return f"the task is {self.task}, not causal"
        if self.loss_objective.link is None:
            return "the loss has no link"
        if self.loss_objective.weight is not None:
            return "the loss has class weights"
        if host.args.torch_compile:
            return "torch_compile is on"
        if host.is_fsdp_enabled or host.is_deepspeed_enabled:
            return "FSDP and DeepSpeed shard the output weight"
        return None

    # --- evaluation

    def prediction_step(
        self,
        model: nn.Module,
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
        """Run the Trainer's loop, then put the token-exact figures in the place of its loss."""
        self._eval_sums.reset()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        output.metrics.update(self._eval_sums.metrics(metric_key_prefix))
        return output


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

    Raises:
        RLOError: question answering, regression, `nn.DataParallel`, DeepSpeed sequence parallelism,
            and whatever else the loss slot does not reach; each message says the way out.
    """


class Seq2SeqTrainer(RootedLossMixin, transformers.Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with the loss as an argument; see `Trainer`."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        """As `Trainer`, with `predict_with_generate` too, where the host takes the model's loss."""
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
