"""A QuIP/GPTQ quantizer with real packed checkpoints.

`quantize` and `evaluate` are what the commands call; `load` opens what they make. Importing this
package is cheap and registers the checkpoint format: at once if transformers' quantizers are
imported already, else at the moment they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlo_gptq.checkpoint.registration import register_when_needed

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from rlo_gptq.jobs import EvalResult, QuantizeResult, evaluate, quantize
    from rlo_gptq.settings import EndToEndSettings, LayerSettings, TuneSettings

__version__ = "0.1.0"
__all__ = [
    "EndToEndSettings",
    "EvalResult",
    "LayerSettings",
    "QuantizeResult",
    "TuneSettings",
    "evaluate",
    "load",
    "loftq_init",
    "quantize",
]

_HOME = {
    "EndToEndSettings": "rlo_gptq.settings",
    "EvalResult": "rlo_gptq.jobs",
    "LayerSettings": "rlo_gptq.settings",
    "QuantizeResult": "rlo_gptq.jobs",
    "TuneSettings": "rlo_gptq.settings",
    "evaluate": "rlo_gptq.jobs",
    "quantize": "rlo_gptq.jobs",
}

register_when_needed()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> PreTrainedModel:
    """Load a quantized model; see `rlo_gptq.checkpoint.load.load`."""
    from rlo_gptq.checkpoint.load import load as load_checkpoint

    return load_checkpoint(
        folder,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        verify=verify,
    )


def loftq_init(model: nn.Module, original: str | Path) -> dict[str, float]:
    """Begin a peft model's adapters at the quantization error; see `rlo_gptq.adapters.loftq`."""
    from rlo_gptq.adapters.loftq import loftq_init as init

    return init(model, original)
