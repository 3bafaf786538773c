"""Writing a GGUF file, tensor by tensor, with the package `gguf`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rlo_core.files import atomic_path
from torch import Tensor

from rlo_gptq.formats.gguf.types import BLOCK_TYPES, GGUFError

Metadata = Mapping[str, tuple[str, Any]]


def check_library() -> None:
    """Refuse to write without the package gguf.

    Raises:
        GGUFError: says how to get it.
    """
    if find_spec("gguf") is None:
        raise GGUFError("--format gguf needs the package gguf: pip install 'rlo-gptq[gguf]'")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Args:
        name: llama.cpp's.
        shape: As in torch, (rows, columns) or (n,).
        kind: Its type's name: F32, F16, BF16 or of `BLOCK_TYPES`.
        load: Returns it when its turn comes: bytes (rows, n) of a block type, else floats.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        count = 1
        for n in self.shape:
            count *= n
        if self.kind in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.kind]
            return count // kind.columns * kind.size
        return count * (4 if self.kind == "F32" else 2)


def write_file(path: Path, architecture: str, metadata: Metadata, entries: Sequence[Entry]) -> int:
    """Write a GGUF file, whole or not at all; one tensor is in memory at a time.

    Args:
        path: Of the file.
        architecture: `general.architecture`.
        metadata: Value type and value of each key.
        entries: The tensors, in the order in which they are to be stored.

    Returns:
        The file's size in bytes.
    """
    import gguf

    with atomic_path(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        try:
            _write(writer, partial, metadata, entries)
        finally:
            writer.close()
    return path.stat().st_size


def file_bytes(architecture: str, metadata: Metadata, entries: Sequence[Entry]) -> int:
    """Return the size of the file that `write_file` makes; loads no tensor."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        try:
            _begin(writer, path, metadata, entries)
        finally:
            writer.close()
        begun = path.stat().st_size
    aligned = writer.data_alignment
    return sum(-(-size // aligned) * aligned for size in (begun, *(e.bytes for e in entries)))


def _write(writer: Any, path: Path, metadata: Metadata, entries: Sequence[Entry]) -> None:
    _begin(writer, path, metadata, entries)
    for entry in entries:
        writer.write_tensor_data(_array(entry))


def _begin(writer: Any, path: Path, metadata: Metadata, entries: Sequence[Entry]) -> None:
    """Write everything before the tensors' data."""
    import gguf

    for key, (kind, value) in metadata.items():
        _add(writer, key, kind, value)
    for entry in entries:
        number = gguf.GGMLQuantizationType[entry.kind]
        shape: Sequence[int] = entry.shape
        if entry.kind in BLOCK_TYPES:
            shape = gguf.quant_shape_to_byte_shape(entry.shape, number)
        dtype = np.dtype(np.uint8 if entry.kind in BLOCK_TYPES else np.float32)
        writer.add_tensor_info(entry.name, shape, dtype, entry.bytes, raw_dtype=number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _array(entry: Entry) -> np.ndarray[Any, Any]:
    tensor = entry.load().detach().cpu()
    if entry.kind in BLOCK_TYPES:
        found = tensor.contiguous().numpy()
    elif entry.kind == "BF16":
        found = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
    else:
        dtype = torch.float32 if entry.kind == "F32" else torch.float16
        found = tensor.to(dtype).contiguous().numpy()
    if found.nbytes != entry.bytes:
        raise GGUFError(
            f"tensor {entry.name!r} must have {entry.bytes} bytes for shape {entry.shape} and type "
            f"{entry.kind}, got {found.nbytes}"
        )
    return found


def _add(writer: Any, key: str, kind: str, value: Any) -> None:
    """Add one value; `kind` is a GGUF value type's name, with an s for an array of that type."""
    import gguf

    if kind.endswith("s"):
        if not value:  # which the format cannot say
            return
        element = gguf.GGUFValueType[kind.removesuffix("s").upper()]
        writer.add_key_value(key, list(value), gguf.GGUFValueType.ARRAY, sub_type=element)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()])


def copied_metadata(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield key, value, type and element type of what a file says besides its architecture and how
    it was quantized.
    """
    import gguf

    left = {
        "general.architecture",
        "general.file_type",
        "general.quantization_version",
        "general.quantized_by",
    }
    for key, found in gguf.GGUFReader(path).fields.items():
        if key.startswith(("GGUF.", "quantize.", "split.")) or key in left:
            continue
        element = found.types[1] if len(found.types) > 1 else None
        yield key, found.contents(), found.types[0], element
