"""The finished folder: shards and index, config.json, tokenizer, model card; and loading it
again.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError
from rlo_core.files import atomic_path, write_json, write_text
from safetensors import safe_open
from safetensors.torch import load_file

from rlo_gptq.card import model_card
from rlo_gptq.hf_quantizer import METHOD, VERSION, as_error, module_table
from rlo_gptq.settings import LayerSettings
from rlo_gptq.source import save_tensors
from rlo_gptq.validation import CheckpointError, check_folder, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlo_gptq.models import Layout
    from rlo_gptq.source import ModelSource
    from rlo_gptq.work import WorkFolder

SINGLE_FILE_BYTES = 256 << 20
"""Up to this size the model is one file; above it every block is a shard, and nothing is
gathered."""

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def quantization_config(
    layout: Layout, settings: LayerSettings, *, experts: bool
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "settings": settings.to_dict(),
        "blocks": layout.blocks,
        "modules": module_table(layout.linears),
        "split_experts": experts,
    }


def write_weights(parts: list[Path], folder: Path) -> int:
    """Write the tensors of `parts` as one safetensors file, or as one shard each with an index.

    Returns:
        Bytes of all weight files.
    """
    total = sum(part.stat().st_size for part in parts)
    if total <= SINGLE_FILE_BYTES:
        tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            tensors.update(load_file(part))
        save_tensors(folder / "model.safetensors", tensors)
        return (folder / "model.safetensors").stat().st_size
    weight_map, size = {}, 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(part, temporary)
        with safe_open(part, framework="pt") as stored:
            weight_map.update(dict.fromkeys(stored.keys(), name))
        size += part.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return size


def write_checkpoint(
    work: WorkFolder,
    source: ModelSource,
    layout: Layout,
    settings: LayerSettings,
    *,
    base: str,
    dataset: str,
) -> None:
    """Make the checkpoint of the finished parts; the folder counts as done when this returns.

    Args:
        work: With all parts.
        source: The original model.
        layout: Its blocks.
        settings: Of all layers.
        base: The original model's name, for the card.
        dataset: The calibration data, for the card.
    """
    folder = work.folder
    parts = [work.part("rest")] + [work.part(f"block-{i:05d}") for i in range(layout.count)]
    size = write_weights(parts, folder)
    experts = any(".experts." in f".{name}" for name in layout.names())
    config = json.loads(source.config.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    config["quantization_config"] = quantization_config(layout, settings, experts=experts)
    config["architectures"] = [type(source.model).__name__]
    config["dtype"] = str(source.stored_dtype).removeprefix("torch.")
    for name in COPIED:
        if (source.folder / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(source.folder / name, temporary)
    records = [r for part in parts for r in work.records(part.stem) if "layer" in r]
    card = model_card(
        base=base,
        dataset=dataset,
        settings=settings,
        size=size,
        records=records,
        version=version("rlo-gptq"),
    )
    write_text(folder / "README.md", card)
    write_json(folder / "config.json", config)
    work.finish()


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a quantized model, as `AutoModelForCausalLM.from_pretrained` does, with its files
    checked first.

    Args:
        folder: The checkpoint, or a hub name.
        dtype: Of the unquantized weights and of the activations; "auto" is that of the original.
        device_map: As transformers takes it, e.g. "auto" or {"": "cuda:0"}.
        trust_remote_code: Let transformers run code from the folder.

    Raises:
        RLOError: the checkpoint is damaged, hostile, or not ours.
    """
    from transformers import AutoModelForCausalLM

    path = Path(folder)
    if path.exists():
        check_folder(path)
        method = read_quantization(path).get("quant_method")
        require(method == METHOD, f"{str(path)!r} must be quantized by {METHOD}, got {method!r}")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except RLOError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise as_error(error) from error
    return model


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def read_quantization(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` of a folder; empty for a model that is not quantized.

    Raises:
        CheckpointError: config.json is missing or is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(folder)!r} has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"config.json of {str(folder)!r} is not JSON: {error}") from error
    require(isinstance(config, dict), f"config.json of {str(folder)!r} must hold an object")
    found = config.get("quantization_config") or {}
    require(isinstance(found, dict), f"quantization_config must be an object, got {found!r}")
    return dict(found)
