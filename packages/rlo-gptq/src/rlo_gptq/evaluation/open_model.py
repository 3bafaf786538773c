"""Open a model for evaluation: ours, an adapter of ours, a GPTQ checkpoint, or what transformers
loads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError

from rlo_gptq.adapters.merge import ADAPTER_FILE, adapter_base, load_adapted
from rlo_gptq.checkpoint.hf_quantizer import METHOD
from rlo_gptq.checkpoint.load import load, read_quantization
from rlo_gptq.formats.import_gptq import import_checkpoint
from rlo_gptq.models.source import find_model
from rlo_gptq.pipeline.processes import pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluationError(RLOError):
    """An evaluation that cannot be done."""


def open_model(
    name: str, *, device: str = "auto", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load a model, its tokenizer, and its folder: ours, an adapter of ours, a GPTQ checkpoint, or
    what transformers loads.

    Raises:
        RLOError: it cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind: torch.dtype = getattr(torch, dtype)
    place = {"": pick_device(device)}
    if (Path(name) / ADAPTER_FILE).is_file():
        adapter = Path(name)
        adapted: Any = load_adapted(adapter, dtype=kind, device_map=place)
        return adapted, AutoTokenizer.from_pretrained(adapter_base(adapter)), adapter
    folder = find_model(name)
    method = read_quantization(folder).get("quant_method")
    if method == METHOD:
        model = load(folder, dtype=kind, device_map=place)
    elif method == "gptq":  # transformers would need GPTQModel, and half precision
        with tempfile.TemporaryDirectory(prefix="rlo-gptq-") as scratch:
            ours = import_checkpoint(folder, Path(scratch) / "imported").folder
            model = load(ours, dtype=kind, device_map=place)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, device_map=place)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise EvaluationError(
                f"{name!r} does not load: {' '.join(str(error).split())}"
            ) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model, AutoTokenizer.from_pretrained(folder), folder


def check_model(name: str) -> Path:
    """Return a model's folder, or an adapter's.

    Raises:
        RLOError: there is no such model.
    """
    return Path(name) if (Path(name) / ADAPTER_FILE).is_file() else find_model(name)
