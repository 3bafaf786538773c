"""Where the Trainer and this package's losses differ in convention, and where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlo_core.errors import RLOError
from torch import Tensor
from transformers.utils import logging

from rlo_hf.tasks import Task, base_of

logger = logging.get_logger(__name__)


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
    if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
        raise RLOError(
            f"{type(base).__name__} does not make decoder inputs from labels; let the collator add "
            "decoder_input_ids"
        )
    made = base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    inputs["decoder_input_ids"] = made


def smoothing_of(host: Any) -> float:
    factor = float(host.args.label_smoothing_factor)
    problem = getattr(base_of(host.model).config, "problem_type", None)
    # transformers has warned that it does not apply there.
    return 0.0 if problem == "multi_label_classification" else factor


def refuse_hosts(host: Any) -> None:
    """Raise where the Trainer would pass the loss slot by, and make Liger leave the loss alone."""
    if host.args.n_gpu > 1:
        raise RLOError(
            f"nn.DataParallel over {host.args.n_gpu} GPUs is not supported; start with `torchrun` "
            "or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    parallel = getattr(host.accelerator, "parallelism_config", None)
    if parallel is not None and parallel.sp_backend == "deepspeed" and parallel.sp_enabled:
        raise RLOError(
            "DeepSpeed sequence parallelism passes the loss slot by; use context parallelism, or "
            "rlo_hf.set_loss(model, ...) with transformers' own Trainer"
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
