"""How wide the tensors of a model were before its files were widened to be read.

A GGUF file is unpacked to float32 so that transformers can read it. What is not quantized anew need
not be stored that wide: a note in the unpacked folder says how wide it came.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rlo_core.files import write_json
from torch import Tensor

NOTE = "stored-types.json"
_WIDE = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}


@dataclass(frozen=True)
class StoredTypes:
    """How wide a model came.

    Args:
        matrices: The type that holds its matrices, "float16" or "bfloat16"; None for that of the
            files.
        embedding_bits: Bits of a value of the token embedding; None if it is what its type says.
    """

    matrices: str | None = None
    embedding_bits: int | None = None

    def narrowed(self, tensor: Tensor, stored: torch.dtype) -> torch.dtype:
        """Return the type to store a tensor in whose file has it as `stored`."""
        if self.matrices is None or tensor.ndim < 2:
            return stored
        own: torch.dtype = getattr(torch, self.matrices)
        return own if own.itemsize < stored.itemsize else stored


def gguf_types(file: Path) -> StoredTypes:
    """Return how wide the tensors of a GGUF file are; reads its header only."""
    from gguf import GGUFReader

    types = {t.name: t.tensor_type.name for t in GGUFReader(str(file)).tensors if len(t.shape) > 1}
    kinds = set(types.values())
    matrices = "bfloat16" if "BF16" in kinds else "float16"
    embedding = types.get("token_embd.weight", "F32")
    digits = re.match(r"[A-Z]*Q(\d+)", embedding)
    return StoredTypes(
        None if kinds & {"F32", "F64"} else matrices,
        int(digits[1]) if digits else _WIDE.get(embedding),
    )


def write_stored_types(folder: Path, types: StoredTypes) -> None:
    """Leave the note in a folder."""
    write_json(folder / NOTE, asdict(types))


def read_stored_types(folder: Path) -> StoredTypes:
    """Return the note of a folder; what the files say where there is none."""
    if not (folder / NOTE).is_file():
        return StoredTypes()
    return StoredTypes(**json.loads((folder / NOTE).read_text("utf-8")))


def copy_stored_types(source: Path, folder: Path) -> None:
    """Take the note of a folder over into another, if there is one."""
    if (source / NOTE).is_file():
        shutil.copyfile(source / NOTE, folder / NOTE)
