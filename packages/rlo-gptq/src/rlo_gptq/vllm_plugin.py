"""The entry point that vLLM calls in each of its processes: our format becomes one of its own."""

from __future__ import annotations

import importlib


def register() -> None:
    """Register `rlo-gptq` with vLLM's quantization methods (group `vllm.general_plugins`)."""
    importlib.import_module("rlo_gptq.checkpoint.vllm_linear")
