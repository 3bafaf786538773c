r"""Adapters that begin as the best low-rank correction of the quantization error.

For a packed layer with weight :math:`\hat W` of an original W, and an adapter of rank r that adds
:math:`s B A`, the r largest singular triples of :math:`W - \hat W` are put into B and A.

Source: LoftQ (2310.08659), one step for a base that is quantized already.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError
from torch import Tensor, nn

from rlo_gptq._compat import folder_of
from rlo_gptq.models.fold_checkpoint import fold_checkpoint
from rlo_gptq.models.layout import split_all_experts
from rlo_gptq.models.source import ModelSource, find_model, release
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.work_folder import PLAN_FILE


class AdapterError(RLOError):
    """Adapters that cannot be begun or merged."""


@torch.no_grad()
def loftq_init(
    model: nn.Module, original: str | Path, *, adapter_name: str = "default"
) -> dict[str, float]:
    """Set the adapters of a peft model from the difference of its packed layers to the original.

    The original's weights are read a block at a time.

    Args:
        model: From `peft.get_peft_model` over a model of ours, with LoRA adapters not yet trained.
        original: The model that was quantized: a folder, a GGUF file or a hub name.
        adapter_name: Which adapters.

    Returns:
        For each layer the part of the error's energy that is left, in [0, 1].

    Raises:
        AdapterError: there are no such adapters, or the original is another model.
    """
    layers = adapted_layers(model, adapter_name)
    left: dict[str, float] = {}
    with _original(model, original) as source:
        parts: dict[str, list[str]] = {}
        for name in layers:
            parts.setdefault(_block_of(name), []).append(name)
        for part, names in parts.items():
            try:
                block = source.load_module(part)
            except AttributeError:
                raise AdapterError(f"original {str(original)!r} has no block {part!r}") from None
            split_all_experts(block)
            for name in names:
                weight = block.get_parameter(f"{name.removeprefix(f'{part}.')}.weight")
                left[name] = _begin(name, layers[name], adapter_name, weight, original)
            release(block)
    return left


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Return the packed layers with LoRA adapters of a peft model, by their names in its base.

    Raises:
        AdapterError: there are none, or some are of a kind that adds more than s B A.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(getattr(module, "base_layer", None), QuantLinear):
            lora: Any = module
            if adapter_name not in getattr(lora, "lora_A", {}):
                continue
            if adapter_name in getattr(lora, "lora_variant", {}):
                raise AdapterError(
                    f"adapter of {name!r} must be plain LoRA, got a variant (DoRA and the like)"
                )
            found[name] = module
    if not found:
        raise AdapterError(f"the model has no LoRA adapter {adapter_name!r} on a packed layer")
    return found


def _block_of(name: str) -> str:
    """Return the path of the block a layer is in: up to its first number."""
    parts = name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: number + 1])


@contextmanager
def _original(model: nn.Module, original: str | Path) -> Iterator[ModelSource]:
    """Open the original, rotated as the quantized model was if that had its rotations folded."""
    folder = find_model(str(original))
    scratch: Path | None = None
    seed = _folded_seed(model)
    try:
        if seed is not None:
            scratch = Path(tempfile.mkdtemp(prefix="rlo-gptq-"))
            folder = fold_checkpoint(folder, scratch / "folded", seed=seed)
        source = ModelSource(folder)
        try:
            yield source
        finally:
            source.close()
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _folded_seed(model: nn.Module) -> int | None:
    """Return the seed of the rotations folded into a model's checkpoint; None without any."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    try:
        plan = json.loads((Path(folder_of(base.config)) / PLAN_FILE).read_text("utf-8"))
        decisions = plan["decisions"]
        return int(decisions["seed"]) if decisions.get("rotate") == "fold" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begin(
    name: str, module: Any, adapter_name: str, weight: Tensor, original: str | Path
) -> float:
    """Set one adapter; return the part of the error's energy that is left."""
    packed: QuantLinear = module.base_layer
    rounded = packed.dequantize()
    if weight.shape != rounded.shape:
        raise AdapterError(
            f"layer {name!r} of {str(original)!r} must have shape {tuple(rounded.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    target = weight.to(rounded)
    error = target - rounded
    energy = error.square().sum()
    # A matrix that has nothing to do with the other is at 2; 8 % is what 2 bits leave.
    relative = float(energy / target.square().sum().clamp(min=1e-30))
    if relative > 1:
        raise AdapterError(
            f"layer {name!r} of {str(original)!r} is not what was quantized: the relative squared "
            f"difference is {relative:.3g}"
        )
    down, up = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    rank = min(down.shape[0], *error.shape)
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    root = (s[:rank] / module.scaling[adapter_name]).sqrt()
    down.zero_()
    up.zero_()
    down[:rank] = root[:, None] * vt[:rank]
    up[:, :rank] = u[:, :rank] * root
    return float(s[rank:].square().sum() / energy.clamp(min=1e-30))
