"""Make the finished folder: shards and index, config.json, tokenizer, model card."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rlo_core.files import write_text

from rlo_gptq.checkpoint.card import model_card
from rlo_gptq.checkpoint.hf_quantizer import module_table
from rlo_gptq.models import shards
from rlo_gptq.models.shards import ShardWriter, stored_bytes
from rlo_gptq.pipeline.outside import part_names
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from rlo_gptq.models.source import ModelSource
    from rlo_gptq.pipeline.plan import Plan
    from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.checkpoint.load import quantization_config, weight_bytes


def write_weights(parts: list[Path], writer: ShardWriter) -> None:
    """Take the tensors of `parts` over as one safetensors file, or as a shard for each."""
    if sum(stored_bytes(part) for part in parts) <= shards.SINGLE_FILE_BYTES:
        writer.join(parts)
        return
    for number, part in enumerate(parts, 1):
        writer.copy(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)


def write_checkpoint(
    work: WorkFolder,
    source: ModelSource,
    plan: Plan,
    settings: LayerSettings,
    *,
    base: str,
    dataset: str,
) -> None:
    """Make the checkpoint of the finished parts, which stay until the run's report is written.

    Args:
        work: With all parts.
        source: The original model.
        plan: What was done: blocks, embedding, head.
        settings: Of all layers.
        base: The original model's name, for the card.
        dataset: The calibration data, for the card.
    """
    folder = work.folder
    layout = plan.layout
    parts = [work.part(name) for name in part_names(layout, plan.outside)]
    config = json.loads(source.config.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    config["quantization_config"] = quantization_config(
        settings,
        blocks=layout.blocks,
        modules=module_table(layout.linears),
        experts=layout.experts,
        outside=plan.outside.to_config(),
        bits=layout.bits_in_blocks(),
    )
    config["architectures"] = [type(source.model).__name__]
    config["dtype"] = str(source.stored_dtype).removeprefix("torch.")
    every = [record for part in parts for record in work.records(part.stem)]
    records = [r for r in every if "layer" in r and not r.get("outside")]
    writer = ShardWriter(folder, digests=True)
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
