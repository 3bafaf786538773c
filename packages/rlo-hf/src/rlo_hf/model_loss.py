"""`set_loss(model, "rlo")`: the model's own loss slot, for any training loop.

The slot is `model.loss_function`, per instance. The table behind it (`LOSS_MAPPING`) is not
touched: the Trainer counts labels by what is in it.
"""

from __future__ import annotations

import inspect
from typing import Any

from rlo_core.errors import RLOError
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from rlo_hf.evaluation import EvalLoss
from rlo_hf.objective import Loss, Objective
from rlo_hf.self_check import compare_once, reference_total, watch_outputs
from rlo_hf.tasks import Task, base_of, is_multi_label, shifted, task_of


class ModelLoss:
    """A rooted loss behind the signature of `model.loss_function`.

    Not a module: one that is assigned to a model would be saved and sharded with it.
    """

    def __init__(self, base: nn.Module, objective: Objective, task: Task, eval_loss: EvalLoss):
        self.base, self.objective, self.task = base, objective, task
        self.cross_entropy = Objective("ce") if eval_loss == "ce" else None
        self.pending = False
        self.asked = False

    def _check(self, total: Tensor, scores: Tensor, target: Tensor) -> None:
        """Compare the first training batch with the formula, and note that its loss is used."""
        self.pending = False
        expected = reference_total(self.objective, scores, target)
        compare_once(self.objective.name, total, expected)

        def used(grad: Tensor) -> None:
            self.asked = True

        total.register_hook(used)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        pooled_logits: Tensor | None = None,
        config: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Return the loss: a mean over kept labels, or their sum by `num_items_in_batch`."""
        scores = pooled_logits if pooled_logits is not None else logits
        objective = self.objective
        if self.cross_entropy is not None and not self.base.training:
            objective = self.cross_entropy
        if scores is None or (labels is None and shift_labels is None):
            raise RLOError("the model called its loss without logits or labels")
        target = shift_labels if shift_labels is not None else labels
        assert target is not None
        target = target.to(scores.device)
        if self.task == "sequence" and is_multi_label(config or self.base.config, target):
            target = target.float()
            total = objective.binary_total(scores, target)
        else:
            target = objective.canonical(target)
            if ignore_index != -100:
                target = target.masked_fill(target == ignore_index, -100)
            if self.task == "causal" and shift_labels is None:
                target = shifted(target)
            total = objective.total(scores.reshape(-1, scores.shape[-1]), target.reshape(-1))
        if self.pending and self.base.training and total.requires_grad:
            self._check(total, scores, target)
        count = num_items_in_batch
        if count is None:
            count = objective.count(target).clamp(min=1)
        elif isinstance(count, Tensor):
            count = count.to(total.device)
        return total / count


def set_loss(
    model: nn.Module, loss: Loss, *, eval_loss: EvalLoss = "objective", check: bool = True
) -> nn.Module:
    """Make `model(..., labels=labels).loss` a rooted loss, in any loop.

    Works on the transformers model inside PEFT and parallel wrappers, on that instance only. Give
    it the same model again to change the loss; `"ce"` gives cross entropy back.

    Args:
        model: A transformers model whose class takes its loss from `self.loss_function`.
        loss: A spec, a criterion, its class or a callable; see `rlo_hf.objective.Objective`.
        eval_loss: What `.loss` is while the model is in evaluation mode: the "objective", or "ce"
            for loops that take exp of it for perplexity.
        check: As `rlo_hf.Trainer`: at the first training batch the loss is computed once more, and
            the gradient that reaches the logits must come from it.

    Returns:
        The same `model`.

    Raises:
        RLOError: the model computes its loss inline, does not have one, or has no rooted form; the
            message names the way in that works.
    """
    base: Any = base_of(model)
    task = task_of(model)
    name = type(base).__name__
    if not _uses_slot(base):
        raise RLOError(
            f"{name} computes its loss inside forward, not through loss_function, so it would go "
            "on with cross entropy; use rlo_hf.Trainer(..., loss=...), or call a criterion on its "
            "logits"
        )
    if task == "causal" and LOSS_MAPPING.get(base.loss_type or "") is not ForCausalLMLoss:
        # GPT-2 and others whose class name has no entry: the Trainer then counts a label too many
        # per row. Only what it looks up for counting is set here, on this instance.
        base.loss_type = "ForCausalLM"
    slot = ModelLoss(base, Objective(loss), task, eval_loss)
    base.loss_function = slot
    _guard(base)
    if check:
        slot.pending = True
        watch_outputs(base, slot.objective.name, lambda module: module.loss_function.asked)
    return model


def _uses_slot(base: nn.Module) -> bool:
    """Whether the class's forward takes its loss from `self.loss_function`."""
    forward = inspect.unwrap(type(base).forward)
    return "loss_function" in forward.__code__.co_names


def _guard(base: nn.Module) -> None:
    """Refuse a forward that was put in the model's place afterwards and has a loss of its own."""
    if getattr(base, "_rlo_guarded", False):
        return

    def check(module: nn.Module, args: Any) -> None:
        forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
        if forward.__module__.startswith("liger_kernel."):
            raise RLOError(
                "Liger has replaced this model's forward and computes cross entropy in it; turn "
                "fused_linear_cross_entropy off in liger_kernel_config, or use rlo_hf.Trainer"
            )

    base.register_forward_pre_hook(check)
    base._rlo_guarded = True  # type: ignore[assignment]
