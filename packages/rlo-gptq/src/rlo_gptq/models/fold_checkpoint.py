"""Folding the rotations of a whole checkpoint, a block at a time, into a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlo_core.files import write_json
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.models.fold import Fold, check_foldable, folded_config
from rlo_gptq.models.shards import ShardWriter, save_tensors
from rlo_gptq.models.source import ModelSource, release
from rlo_gptq.models.stored_types import copy_stored_types

NOTE = "fold.json"
TIED_HEAD = "fold-tied-head.safetensors"


def folded_copy(folder: Path) -> Path:
    """Return where the folded form of a model that is quantized into `folder` is kept."""
    return folder.with_name(f".{folder.name}.folded")


@dataclass(frozen=True)
class FoldedHead:
    r"""A head that was tied to the embedding before rotations were folded; see `TiedHead`.

    Args:
        kind: Of the rotation Q of the residual stream, for `residual_rotation`.
        seed: Of Q.
        gain: g of the norm before the head, (width,), float32.
    """

    kind: str
    seed: int
    gain: Tensor


def read_folded_head(folder: Path) -> FoldedHead | None:
    """Return the head of a model that `fold_checkpoint` wrote; None if it was not a tied one."""
    if not (folder / TIED_HEAD).is_file():
        return None
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    with safe_open(folder / TIED_HEAD, framework="pt") as stored:
        return FoldedHead(note["rotation"], note["seed"], stored.get_tensor("gain"))


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
        family = check_foldable(config)
        rotation = family.rotation
        origin = {"source": source.fingerprint(), "seed": seed, "rotation": rotation}
        note = out / NOTE
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
    tied = "lm_head.weight" not in names
    parts: dict[str, list[str]] = {}
    for name in fold.output_names:
        inside = name.removeprefix(f"{fold.family.blocks}.")
        part = f"block-{int(inside.partition('.')[0]):05d}" if inside != name else name
        parts.setdefault(part, []).append(name)
    writer = ShardWriter(out)
    embedding = f"{fold.family.embeddings[0]}.weight"
    for part, members in parts.items():
        # A head that was tied has the embedding's type.
        dtypes = {name: source.in_file.get(name, source.in_file[embedding]) for name in members}
        tensors = {name: fold.tensor(name).to(dtypes[name]) for name in members}
        release(source.model)
        file = f"model-{part.removesuffix('.weight').replace('.', '-')}.safetensors"
        writer.add(file, tensors)
        if progress is not None:
            progress(len(writer.weight_map), len(fold.output_names))
    if tied:
        save_tensors(out / TIED_HEAD, {"gain": fold.head_gain().float()})
        release(source.model)
    copy_stored_types(source.folder, out)
    writer.finish(folded_config(source.config.to_dict()), texts=source.folder)
