"""The finished folder: shards and index, config.json, tokenizer, model card; and loading it
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError
from rlo_core.files import write_text

from rlo_gptq.card import model_card
from rlo_gptq.hf_quantizer import METHOD, VERSION, RLOGPTQConfig, as_error, module_table
from rlo_gptq.settings import LayerSettings
from rlo_gptq.shards import ShardWriter
from rlo_gptq.validation import (
    check_folder,
    check_sizes,
    read_headers,
    read_object,
    require,
    weight_paths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlo_gptq.models import Layout
    from rlo_gptq.source import ModelSource
    from rlo_gptq.work import WorkFolder

SINGLE_FILE_BYTES = 256 << 20
"""Up to this size the model is one file; above it every block is a shard, and nothing is
gathered."""


def quantization_config(
    settings: LayerSettings,
    *,
    blocks: str,
    modules: Mapping[str, list[int] | None],
    experts: bool = False,
    permuted: bool = False,
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; see `RLOGPTQConfig` for the fields."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "settings": settings.to_dict(),
        "blocks": blocks,
        "modules": dict(modules),
        "split_experts": experts,
        **({"permuted": True} if permuted else {}),  # other readers need to know only then
    }


def write_weights(parts: list[Path], writer: ShardWriter) -> None:
    """Take the tensors of `parts` over as one safetensors file, or as a shard for each."""
    if sum(part.stat().st_size for part in parts) <= SINGLE_FILE_BYTES:
        writer.join(parts)
        return
    for number, part in enumerate(parts, 1):
        writer.copy(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)


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
    config = json.loads(source.config.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    config["quantization_config"] = quantization_config(
        settings,
        blocks=layout.blocks,
        modules=module_table(layout.linears),
        experts=layout.experts,
    )
    config["architectures"] = [type(source.model).__name__]
    config["dtype"] = str(source.stored_dtype).removeprefix("torch.")
    records = [r for part in parts for r in work.records(part.stem) if "layer" in r]
    writer = ShardWriter(folder)
    write_weights(parts, writer)
    card = model_card(
        base=base,
        dataset=dataset,
        settings=settings,
        size=weight_bytes(folder),
        records=records,
        version=version("rlo-gptq"),
        folded=work.decisions.get("rotate") == "fold",
    )
    write_text(folder / "README.md", card)
    writer.finish(config, texts=source.folder)
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
        found = read_quantization(path)
        method = found.get("quant_method")
        require(method == METHOD, f"{str(path)!r} must be quantized by {METHOD}, got {method!r}")
        RLOGPTQConfig.from_dict(found)
        check_sizes(read_object(path / "config.json"), read_headers(weight_paths(path)))
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except RLOError:
        raise
    except Exception as error:  # a hostile config.json provokes any of them
        raise as_error(error) from error
    return model


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files of a model's folder."""
    return sum(file.stat().st_size for file in weight_files(folder))


def read_quantization(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` of a folder; empty for a model that is not quantized.

    Raises:
        CheckpointError: config.json is missing or is no JSON object.
    """
    config = read_object(folder / "config.json")
    found = config.get("quantization_config") or {}
    require(isinstance(found, dict), f"quantization_config must be an object, got {found!r}")
    return dict(found)
