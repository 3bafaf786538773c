"""Adapters merged into a packed model, which is packed again afterwards.

What a finetuned model computes is `(What + s B A) x`, and no grid of the packed layer holds that
sum. So the sums are written out as an ordinary model, a block at a time, and that is quantized with
the settings the packed model was quantized with, calibrated anew. The rounding costs something
again; keeping the adapter beside the packed model costs nothing but its own few megabytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rlo_core.files import write_json
from rlo_core.lm.models import ADAPTER_FILE, adapter_base, open_model
from torch import Tensor, nn

from rlo_gptq.adapters.loftq import AdapterError, adapted_layers
from rlo_gptq.checkpoint.hf_quantizer import METHOD
from rlo_gptq.checkpoint.load import read_quantization, weight_files
from rlo_gptq.models.digests import file_digests
from rlo_gptq.models.experts import SplitExperts
from rlo_gptq.models.shards import ShardWriter, new_folder
from rlo_gptq.options import Options
from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.pipeline.work_folder import PLAN_FILE
from rlo_gptq.settings import EndToEndSettings, LayerSettings, TuneSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
NOTE = "merged.json"
ADAPTER = "default"  # the name peft gives to the adapter of a folder


def packed_base(adapter: Path) -> Path:
    """Return the folder of the packed model that an adapter's folder names.

    Raises:
        AdapterError: there is no adapter, or its base is not a packed model of ours.
    """
    if not (adapter / ADAPTER_FILE).is_file():
        raise AdapterError(f"{str(adapter)!r} has no {ADAPTER_FILE}")
    name = adapter_base(adapter)
    base = Path(name)
    if not base.is_dir():
        raise AdapterError(f"the base model of adapter {str(adapter)!r}, {name!r}, is not a folder")
    method = read_quantization(base).get("quant_method")
    if method != METHOD:
        raise AdapterError(
            f"the base model {name!r} must be quantized by {METHOD}, got {method!r}; merge others "
            "with peft's merge_and_unload()"
        )
    return base


def quantize_options(
    base: Path, dataset: str, *, changes: Mapping[str, Any], tune: bool | None
) -> Options:
    """Return the options with which a packed model was quantized, for calibration on `dataset`.

    Args:
        base: The packed model's folder.
        dataset: For calibration.
        changes: What is to be otherwise; None keeps what was.
        tune: Finetune blocks, and the whole model if that was done; False does neither, None as was
            done.
    """
    try:
        made: dict[str, Any] = json.loads((base / PLAN_FILE).read_text("utf-8"))["decisions"]
    except (OSError, ValueError, KeyError, TypeError):
        made = {}  # imported from another format
    kept = {name: made[name] for name in _KEPT if name in made}
    tuned = made.get("tune")
    if tune is not None:
        tuned = (tuned or {}) if tune else None
    whole = made.get("end_to_end") if tune is not False else None
    if whole is not None:  # what was trained on is beside the settings
        whole = {field.name: whole[field.name] for field in fields(EndToEndSettings)}
    quantization = read_quantization(base)
    of_layers: dict[str, int] = quantization.get("bits") or {}
    return Options(
        model=str(base),
        dataset=dataset,
        layer=LayerSettings.from_dict(quantization["settings"]),
        bits=tuple((f"{quantization['blocks']}.{name}", of_layers[name]) for name in of_layers),
        **{
            **kept,
            **{name: value for name, value in changes.items() if value is not None},
            "skip": tuple(made.get("skip", ())),
            "tune": None if tuned is None else TuneSettings(**tuned),
            "end_to_end": None if whole is None else EndToEndSettings(**whole),
        },
    )


# A folded rotation is in the weights already. Seeds are kept: the same rotations at run time.
_KEPT = (
    "nsamples",
    "seqlen",
    "seed",
    "true_sequential",
    "dtype",
    "hessian",
    "hessian_energy",
    "embed_bits",
    "head_bits",
)


def write_merged(adapter: Path, out: Path) -> Path:
    """Write a packed model and its adapter as an ordinary model, one block dense at a time.

    A folder that was made of the same files is taken as it is: it appears whole or not at all.

    Args:
        adapter: The adapter's folder, which names the packed model.
        out: The new folder.

    Returns:
        `out`.

    Raises:
        AdapterError: the model has experts, or adapters that are not plain LoRA.
    """
    origin = _origin(adapter)
    note = out / NOTE
    if note.is_file() and json.loads(note.read_text("utf-8")) == origin:
        return out
    packed_base(adapter)
    model = open_model(str(adapter))
    shutil.rmtree(out, ignore_errors=True)  # made of other files
    with new_folder(out, AdapterError) as partial:
        _write_model(model, partial)
        write_json(partial / NOTE, origin)
    return out


def _origin(adapter: Path) -> dict[str, str]:
    """Return what identifies an adapter and the packed model it belongs to."""
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"{str(adapter)!r} lacks {weights.name}")
    return file_digests([weights, *weight_files(packed_base(adapter))])


@torch.no_grad()
def _write_model(model: nn.Module, out: Path) -> None:
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if any(isinstance(module, SplitExperts) for module in base.modules()):
        raise AdapterError("adapters of a mixture of experts cannot be merged; keep them beside it")
    adapted = adapted_layers(model, ADAPTER)
    parts: dict[str, list[str]] = {}
    for name in _tensor_names(base):
        number = next((part for part in name.split(".") if part.isdecimal()), None)
        parts.setdefault("rest" if number is None else f"{int(number):05d}", []).append(name)
    writer = ShardWriter(out)
    for part, members in parts.items():
        tensors = {name: _dense(base, name, adapted) for name in members}
        writer.add(f"model-{part}.safetensors", tensors)
    config = json.loads(base.config.to_json_string(use_diff=False))
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(base).__name__]
    writer.finish(config, texts=Path(base.config._name_or_path))


def _tensor_names(base: Any) -> list[str]:
    """Return the names of an ordinary model's tensors, without peft's layers between."""
    tied = set(base.all_tied_weights_keys)
    names: dict[str, None] = {}
    for name in base.state_dict():
        plain = name.replace(".base_layer.", ".")
        owner, _, child = plain.rpartition(".")
        if ".lora_" in name or plain in tied:
            continue
        packed = _layer(base, owner)
        if isinstance(packed, TiedHead):  # a folded one is written from the embedding's matrix
            names.update({f"{owner}.weight": None} if packed.fold is not None else {})
        elif not isinstance(packed, PackedWeight) or child in ("weight", "bias"):
            names[plain] = None
    return list(names)


def _layer(base: Any, name: str) -> nn.Module:
    module: nn.Module = base.get_submodule(name)
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _dense(base: Any, name: str, adapted: dict[str, nn.Module]) -> Tensor:
    owner, _, child = name.rpartition(".")
    packed = _layer(base, owner)
    if not isinstance(packed, (PackedWeight, TiedHead)) or child != "weight":
        tensor: Tensor = getattr(packed, child)
        return tensor
    weight = packed.dequantize()
    lora: Any = adapted.get(owner)
    return weight if lora is None else weight + lora.get_delta_weight(ADAPTER).to(weight)
