"""A model for evaluation: opened as every command opens one, its tokenizer, and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rlo_core.errors import RLOError
from rlo_core.lm import models
from rlo_core.lm.models import ADAPTER_FILE
from rlo_core.runs.record import read_run

from rlo_gptq.checkpoint.validation import read_object
from rlo_gptq.models.source import find_model
from rlo_gptq.pipeline.processes import pick_device
from rlo_gptq.pipeline.work_folder import PLAN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluationError(RLOError):
    """An evaluation that cannot be done."""


def open_model(
    name: str, *, device: str = "auto", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load a model, its tokenizer, and its folder, as `rlo_core.lm.models.open_model` does.

    Args:
        name: A folder, a GGUF file, a hub name or an adapter's folder, quantized or not.
        device: "auto", "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.

    Raises:
        RLOError: it cannot be found or read.
    """
    folder = check_model(name)  # a hub name as its folder, a GGUF file as safetensors
    place = {"": pick_device(device)}
    model = models.open_model(str(folder), dtype=getattr(torch, dtype), device_map=place)
    return model, models.open_tokenizer(str(folder)), folder


def check_model(name: str) -> Path:
    """Return a model's folder, or an adapter's.

    Raises:
        RLOError: there is no such model.
    """
    return Path(name) if (Path(name) / ADAPTER_FILE).is_file() else find_model(name)


def calibration_fingerprints(folder: Path) -> set[str]:
    """Return what identifies the texts that a model was calibrated or tuned on; none if unknown."""
    if (folder / ADAPTER_FILE).is_file():
        return calibration_fingerprints(check_model(models.adapter_base(folder)))
    found = set()
    try:
        run = read_run(folder)
        found.add(run["data"]["fingerprint"])
    except (RLOError, KeyError, TypeError):
        pass
    try:
        plan = read_object(folder / PLAN_FILE)["decisions"]
        found.add(plan["data"]["fingerprint"])
        found.add(plan["end_to_end"]["data"]["fingerprint"])
    except (RLOError, KeyError, TypeError):
        pass
    return {text for text in found if isinstance(text, str)}
