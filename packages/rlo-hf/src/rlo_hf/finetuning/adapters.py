"""LoRA adapters on the model of a finetuning, quantized ones included."""

from __future__ import annotations

import importlib.util
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.lm.models import ModelError, initialize_adapters

from rlo_hf.finetuning.options import FinetuneOptions


def with_adapters(model: Any, options: FinetuneOptions) -> Any:
    """Return the model as it is trained: with the adapters that the options ask for, or itself.

    Raises:
        ModelError: a quantized model without adapters, no layer that takes them, or adapters that
            are there already.
    """
    if not options.lora:
        if getattr(model, "is_quantized", False):
            raise ModelError(
                f"model {options.model!r} is quantized, so its weights cannot be trained; train "
                "adapters on it with --lora RANK"
            )
        return model
    import peft

    if isinstance(model, peft.PeftModel):
        raise ModelError(f"{options.model!r} is an adapter; leave --lora out to train it further")
    config = peft.LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"peft cannot put adapters on {options.model!r}: {error}") from error
    if options.lora_init == "loftq":
        initialize_adapters(adapted, options.model, options.original or "")
    return adapted


def check_adapters(options: FinetuneOptions) -> None:
    """Check the adapter options, before anything is loaded.

    Raises:
        RLOError: they contradict each other, or peft is not installed.
    """
    if options.lora_init not in ("default", "loftq"):
        raise RLOError(f"lora_init must be default or loftq, got {options.lora_init!r}")
    if options.lora_init == "default":
        if options.original is not None:
            raise RLOError("--original needs --lora-init loftq")
    elif not options.lora or options.original is None:
        raise RLOError("--lora-init loftq needs --lora and --original MODEL")
    if options.lora and importlib.util.find_spec("peft") is None:
        raise ModelError("--lora needs the package peft: pip install 'rlo-hf[peft]'")
