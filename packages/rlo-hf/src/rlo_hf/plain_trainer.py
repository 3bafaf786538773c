"""`compute_loss_func=loss_func("rlo")`: the slot of transformers' own Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rlo_core.errors import RLOError
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from rlo_hf.objective import Loss, Objective
from rlo_hf.self_check import compare_once, reference_total, watch_outputs
from rlo_hf.tasks import Task, base_of, is_multi_label, shifted, task_of

LossFunc = Callable[..., Tensor]


def loss_func(
    loss: Loss = "rlo", *, model: nn.Module | None = None, check: bool = True
) -> LossFunc:
    """Return a `compute_loss_func` for transformers' own Trainer.

    The slot is given outputs, labels and a count, and no model: `Trainer` and `Seq2SeqTrainer` of
    this package do more (exact counts for every model, the fused path, perplexity, label
    smoothing).

    Args:
        loss: A spec, a criterion, its class or a callable.
        model: The model that will be trained, where its class cannot be told from its outputs.
            Needed for GPT-2 and its like with gradient accumulation, whose labels the Trainer
            counts one too many per row; it has to be given before the Trainer is made. With it, a
            training step that passes the function by is found too.
        check: As `rlo_hf.Trainer`: the first batch is computed once more and compared.

    Returns:
        `f(outputs, labels, num_items_in_batch=None) -> loss`.

    Raises:
        RLOError: on the first batch, where this way cannot be exact: encoder-decoder models, class
            weights, several GPUs in one process.
    """
    objective = Objective(loss)
    if objective.weight is not None:
        raise RLOError(
            "a loss with class weights needs the weights of all accumulated labels counted; use "
            "rlo_hf.Trainer(..., loss=...)"
        )
    task: Task | None = None
    if model is not None:
        task = task_of(model)
        base: Any = base_of(model)
        if task == "causal" and LOSS_MAPPING.get(base.loss_type or "") is not ForCausalLMLoss:
            base.loss_type = "ForCausalLM"  # what the Trainer looks up to count shifted labels

    pending = check
    asked = False

    def seen() -> None:
        nonlocal asked
        asked = True

    if check and model is not None:
        watch_outputs(base_of(model), objective.name, lambda module: asked)

    def compute(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        nonlocal pending
        if labels is None:
            raise RLOError("the batch has no 'labels'")
        kind = task or _task_of_outputs(outputs)
        if kind == "seq2seq":
            raise RLOError(
                "the Trainer keeps labels from an encoder-decoder model that makes its decoder "
                "inputs from them; use rlo_hf.Seq2SeqTrainer(..., loss=...)"
            )
        logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        labels = labels.to(logits.device)
        config = None if model is None else base_of(model).config
        if kind == "sequence" and is_multi_label(config, labels):
            total, target = objective.binary_total(logits, labels.float()), labels
        else:
            target = objective.canonical(labels)
            unshifted = int((target != -100).sum())
            if kind == "causal":
                target = shifted(target)
            total = objective.total(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))
        if total.requires_grad and check:
            if pending:
                pending = False
                compare_once(objective.name, total, reference_total(objective, logits, target))
            total.register_hook(lambda grad: seen())  # type: ignore[no-untyped-call]
        count = objective.count(target)
        if num_items_in_batch is None:
            return total / count.clamp(min=1)
        given = torch.as_tensor(num_items_in_batch)
        if given.numel() != 1:
            raise RLOError("several GPUs in one process are not supported; start with `torchrun`")
        if kind == "causal" and model is None and int(given) == unshifted != int(count):
            given = count  # this batch is the whole count, and it was taken before the shift
        elif (
            kind == "causal" and model is None and _ambiguous(outputs) and int(given) != int(count)
        ):
            raise RLOError(
                "labels of this model are counted before they are shifted, which makes accumulated "
                "gradients too small; use loss_func(loss, model=model) before the Trainer is made"
            )
        return total / given.to(total.device).clamp(min=1)

    return compute


def _ambiguous(outputs: Any) -> bool:
    """GPT-2's outputs, and those of the few others with no entry in transformers' table."""
    return type(outputs).__name__ == "CausalLMOutputWithCrossAttentions"


def _task_of_outputs(outputs: Any) -> Task:
    name = type(outputs).__name__
    if "Seq2SeqLM" in name:
        return "seq2seq"
    if "CausalLM" in name:
        return "causal"
    if "MaskedLM" in name or "TokenClassifier" in name:
        return "token"
    if "Classifier" in name or "MultipleChoice" in name or "NextSentence" in name:
        return "sequence"
    raise RLOError(
        f"the task cannot be told from outputs of type {name}; use loss_func(loss, model=model), "
        "or rlo_hf.Trainer(..., loss=..., task=...)"
    )
