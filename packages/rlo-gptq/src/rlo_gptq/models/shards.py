"""The weight files of a checkpoint folder: shards with their index, and the texts beside them.

Every writer of checkpoints (ours, exports, imports, folded models) goes through here, so that there
is one layout: one `model.safetensors`, or several files and `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError
from rlo_core.files import atomic_path, write_json
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.models.digests import DIGESTS, write_digests

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SINGLE_FILE_BYTES = 256 << 20
"""Up to this size the model is one file; above it every block is a shard, and nothing is
gathered."""
_PIECE = 1 << 20  # bytes in memory at one time


class ShardWriter:
    """Writes weight files into a folder one after the other, and their index at the end.

    Args:
        folder: Is made if it is not there.
        digests: Note the digests of files and tensors beside them.
    """

    def __init__(self, folder: Path, *, digests: bool = False) -> None:
        self.folder = folder
        self.digests = digests
        self.weight_map: dict[str, str] = {}
        self.tensor_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DIGESTS).unlink(missing_ok=True)  # of what stood here before

    def add(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors as one file; files without tensors are left out."""
        if not tensors:
            return
        save_tensors(self.folder / file, tensors)
        self._note(file, tensors)

    def copy(self, file: str, part: Path) -> None:
        """Take a safetensors file over under another name, without its notes."""
        join_files([part], self.folder / file)
        self._note_bytes(file, read_header(part)[0])

    def join(self, parts: Sequence[Path]) -> None:
        """Take several safetensors files over as one, whose tensors never are in memory."""
        join_files(parts, self.folder / SINGLE)
        self._note_bytes(SINGLE, read_header(self.folder / SINGLE)[0])

    def finish(self, config: Mapping[str, Any], *, texts: Path | None = None) -> int:
        """Write the index, the texts of another folder, and config.json (then digests) last.

        Args:
            config: What config.json holds.
            texts: A folder whose tokenizer and generation files are taken over.

        Returns:
            Bytes of all weight files.
        """
        files = sorted(set(self.weight_map.values()))
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.tensor_bytes},
                "weight_map": dict(sorted(self.weight_map.items())),
            }
            write_json(self.folder / INDEX, index)
        elif files != [SINGLE]:  # auto-gptq's gptq_model-4bit-128g.safetensors
            (self.folder / files[0]).replace(self.folder / SINGLE)
            files = [SINGLE]
        if texts is not None:
            copy_texts(texts, self.folder)
        write_json(self.folder / "config.json", config)
        if self.digests:
            write_digests(self.folder, [self.folder / file for file in files])
        return sum((self.folder / file).stat().st_size for file in files)

    def _note(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self.weight_map.update(dict.fromkeys(tensors, file))
        self.tensor_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def _note_bytes(self, file: str, header: Mapping[str, Any]) -> None:
        self.weight_map.update(dict.fromkeys(header, file))
        self.tensor_bytes += sum(end - begin for begin, end in map(_span, header.values()))


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer and generation files of a model's folder."""
    for name in COPIED:
        if (source / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)


@contextmanager
def new_folder(out: Path, error: Callable[[str], RLOError]) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out: Must not exist, or be empty.
        error: Makes the refusal of a folder that is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise error(f"{str(out)!r} must be a new or empty folder; nothing is overwritten")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a file, sorted."""
    with safe_open(file, framework="pt") as stored:
        return sorted(stored.keys())


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file known to be good, and where its data begin."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def join_files(parts: Sequence[Path], out: Path) -> None:
    """Write the tensors of several safetensors files as one file, byte by byte.

    Wide types come first, as the format's own writer has it, so that every tensor is aligned.
    """
    found = {}
    for part in parts:
        header, start = read_header(part)
        for name, entry in header.items():
            found[name] = (part, start, entry)
    text, order = _joined_header({name: entry for name, (_, _, entry) in found.items()})
    with atomic_path(out) as temporary, temporary.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for part, start, entry in (found[name] for name in order):
            begin, end = _span(entry)
            with part.open("rb") as source:
                source.seek(start + begin)
                _copy(source, target, end - begin)


def _joined_header(entries: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """Return the header of a file with these tensors, and their names in its order."""
    order = sorted(entries, key=lambda name: (-_ITEMSIZE.get(entries[name]["dtype"], 1), name))
    joined: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        begin, end = _span(entries[name])
        kind, shape = entries[name]["dtype"], entries[name]["shape"]
        span = [position, position + end - begin]
        joined[name] = {"dtype": kind, "shape": list(shape), "data_offsets": span}
        position += end - begin
    text = json.dumps(joined, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def stored_bytes(file: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, without its header."""
    return sum(end - begin for begin, end in map(_span, read_header(file)[0].values()))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors, which may be on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the file that `join_files` makes of these tensors; they need no data."""
    entries = {
        name: {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [0, tensor.numel() * tensor.element_size()],
        }
        for name, tensor in tensors.items()
    }
    text, _ = _joined_header(entries)
    return 8 + len(text) + tensor_bytes(tensors)


def _copy(source: Any, target: Any, count: int) -> None:
    while count:
        piece = source.read(min(count, _PIECE))
        target.write(piece)
        count -= len(piece)


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    return int(begin), int(end)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], *, metadata: Iterable[tuple[str, str]] = ()
) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", **dict(metadata)})
