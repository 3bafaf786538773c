"""Folding the rotations of a whole checkpoint, a block at a time, into a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rlo_core.files import write_json
from torch import Tensor

from rlo_gptq.models.fold import Fold, check_foldable, folded_config
from rlo_gptq.models.shards import ShardWriter
from rlo_gptq.models.source import ModelSource, release


def fold_checkpoint(
    folder: Path,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the folded form of a model to `out`; one block's tensors are in memory at a time.

    The result is an ordinary model of the same class with the same outputs, and with a head of its
    own where that was tied to the embedding. A folder that is there already with the same source
    and seed is taken as it is.

    Args:
        folder: The model's folder, from `rlo_gptq.models.source.find_model`.
        out: The new folder.
        seed: Of the rotations.
        progress: Called with (tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        FoldError: this model's rotations cannot be folded.
        SourceError: the model cannot be read.
    """
    source = ModelSource(folder)
    try:
        config = source.config.to_dict()
        check_foldable(config)
        origin = {"source": source.fingerprint(), "seed": seed}
        note = out / "fold.json"
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == origin:
            return out
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            _write(source, config, partial, seed, progress)
            write_json(partial / note.name, origin)
            if out.exists():
                shutil.rmtree(out)
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        source.close()
    return out


def _write(
    source: ModelSource,
    config: dict[str, Any],
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    def load(name: str) -> Tensor:
        source.load(lambda target: target == name)
        module, _, part = name.rpartition(".")
        tensor: Tensor = getattr(source.model.get_submodule(module), part).detach()
        return tensor

    names = source.targets(lambda _: True)
    if config.get("tie_word_embeddings"):
        names = [name for name in names if name != "lm_head.weight"]
    fold = Fold(config, names, load, seed=seed)
    parts: dict[str, list[str]] = {}
    for name in fold.output_names:
        inside = name.removeprefix(f"{fold.family.blocks}.")
        part = f"block-{int(inside.partition('.')[0]):05d}" if inside != name else name
        parts.setdefault(part, []).append(name)
    writer = ShardWriter(out)
    dtype = source.stored_dtype if isinstance(source.stored_dtype, torch.dtype) else torch.float32
    for part, members in parts.items():
        tensors = {name: fold.tensor(name).to(dtype) for name in members}
        release(source.model)
        file = f"model-{part.removesuffix('.weight').replace('.', '-')}.safetensors"
        writer.add(file, tensors)
        if progress is not None:
            progress(len(writer.weight_map), len(fold.output_names))
    writer.finish(folded_config(source.config.to_dict()), texts=source.folder)
