"""Where the Trainer and this package's losses differ in convention, and where they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlo_core.errors import RLOError
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from rlo_hf.objective import Objective
from rlo_hf.tasks import Task, config_of, is_multi_label, shifted

logger = logging.get_logger(__name__)


def aligned(
    inputs: Mapping[str, Any],
    name: str,
    task: Task,
    objective: Objective,
    config: Any,
    *,
    prompted: bool = False,
) -> Tensor:
    """Return the labels of a batch in the places of the predictions, int64 with -100 ignored.

    Args:
        inputs: The batch.
        name: The key of its labels.
        task: Of the model. Causal labels are shifted, unless the batch has `shift_labels`.
        objective: The loss, for the label that it ignores.
        config: Of the model. Multi-label targets come back as floats, not shifted.
        prompted: Virtual prompt tokens stand in front of the row; the last of them predicts the
            first label, so that causal labels come back one longer.

    Raises:
        RLOError: floating labels for a task that has classes.
    """
    if "shift_labels" in inputs and task == "causal":
        return objective.canonical(inputs["shift_labels"])
    labels: Tensor = inputs[name]
    if task == "sequence" and is_multi_label(config, labels):
        return labels.float()
    if labels.is_floating_point():
        raise RLOError(
            f"labels of a {task} task must be integers, got {labels.dtype}; set "
            "problem_type='multi_label_classification' in the model's config for multi-label"
        )
    labels = objective.canonical(labels)
    if task == "causal" and prompted:
        return nn.functional.pad(labels, (0, 1), value=-100)
    return shifted(labels) if task == "causal" else labels


def matched(scores: Tensor, target: Tensor, task: Task) -> Tensor:
    """Return logits (or hidden states) for the labels: those of virtual prompt tokens in front go.

    Raises:
        RLOError: the shapes do not belong together.
    """
    expected: Sequence[int] = target.shape
    got = scores.shape if target.is_floating_point() else scores.shape[:-1]
    if task == "causal" and len(got) == 2 and got[1] > expected[1]:
        scores = scores[:, -expected[1] :]
        got = scores.shape[:-1]
    if tuple(got) != tuple(expected):
        raise RLOError(
            f"logits must have one row per label: labels have shape {tuple(expected)}, logits "
            f"{tuple(scores.shape)}; task={task!r} may be wrong for this model"
        )
    return scores


def add_decoder_inputs(base: Any, inputs: dict[str, Any]) -> None:
    """Make `decoder_input_ids` from the labels, as the model does when it is given labels."""
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return
    if type(
        base
    ).__name__ in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values() and not hasattr(
        base, "prepare_decoder_input_ids_from_labels"
    ):
        inputs["decoder_input_ids"] = _moved_right(inputs["labels"], base.config)
        return
    if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
        raise RLOError(
            f"{type(base).__name__} does not make decoder inputs from labels; let the collator add "
            "decoder_input_ids"
        )
    made = base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    inputs["decoder_input_ids"] = made


def _moved_right(labels: Tensor, config: Any) -> Tensor:
    """Return decoder inputs as Whisper and other speech models make them of labels."""
    start, padding = config.decoder_start_token_id, config.pad_token_id
    moved = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    return moved.masked_fill(moved == -100, padding)


def router_loss(base: Any, outputs: Any) -> Tensor | float:
    """Return a mixture-of-experts model's balancing loss; it adds that only if given labels."""
    auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if not isinstance(auxiliary, Tensor):
        return 0.0
    config = getattr(base, "config", None)
    if config is None:
        return 0.0
    weight = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)
    return auxiliary * weight


def smoothing_of(host: Any) -> float:
    """Return the label smoothing that a Trainer's arguments ask for, in [0, 1]."""
    factor = float(host.args.label_smoothing_factor)
    problem = getattr(config_of(host.model), "problem_type", None)
    # transformers has warned that it does not apply there.
    return 0.0 if problem == "multi_label_classification" else factor


_LOWER_IS_BETTER = ("ce", "perplexity", "objective")


def smaller_is_better(host: Any) -> None:
    """Let a best checkpoint by `eval_ce`, `eval_perplexity` or `eval_objective` be the smallest.

    transformers takes every metric whose name does not end in "loss" for one to be maximised.
    """
    metric = host.args.metric_for_best_model
    if metric is None or not host.args.greater_is_better:
        return
    if metric in _LOWER_IS_BETTER or metric.endswith(tuple(f"_{m}" for m in _LOWER_IS_BETTER)):
        host.args.greater_is_better = False
        logger.warning(f"metric_for_best_model={metric!r}: the smallest is the best")


def refuse_second_slot(compute_loss_func: Any) -> None:
    """Raise RLOError for a `compute_loss_func` beside `loss`."""
    if compute_loss_func is not None:
        raise RLOError("compute_loss_func and loss are the same slot; give one of them")


def refuse_sequence_parallel(accelerator: Any, way_out: str) -> None:
    """Raise RLOError under DeepSpeed's sequence parallelism, whose step has a loss of its own."""
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.sp_backend == "deepspeed" and parallel.sp_enabled:
        raise RLOError(f"DeepSpeed sequence parallelism passes the loss slot by; {way_out}")


def refuse_hosts(host: Any) -> None:
    """Raise where the Trainer would pass the loss slot by, and make Liger leave the loss alone."""
    if host.args.n_gpu > 1:
        raise RLOError(
            f"nn.DataParallel over {host.args.n_gpu} GPUs is not supported; start with `torchrun` "
            "or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    refuse_sequence_parallel(
        host.accelerator,
        "use context parallelism, or rlo_hf.set_loss(model, ...) with transformers' own Trainer",
    )
    if host.args.use_liger_kernel:
        config = dict(host.args.liger_kernel_config or {})
        wanted = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        if any(config.get(name) for name in wanted):
            raise RLOError(
                "liger_kernel_config must leave fused_linear_cross_entropy and cross_entropy off: "
                "they would replace the loss"
            )
        host.args.liger_kernel_config = {**config, **wanted}
        logger.warning("use_liger_kernel: Liger's cross entropy is off, its other kernels are on")
