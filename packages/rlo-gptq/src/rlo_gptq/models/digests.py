"""Digests of whole files, kept for large ones so that a run that goes on does not read them
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rlo_core.files import write_json, write_text

DIGESTS = "digests.json"
_PIECE = 1 << 20  # bytes in memory at one time
KEPT_FROM = 64 << 20
"""Bytes from which on a digest is kept: smaller files are read faster than looked up."""


def cache_folder() -> Path:
    """Return where models made of GGUF files, and digests, are kept."""
    return Path.home() / ".cache" / "rlo-gptq"


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while piece := handle.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    return {file.name: file_digest(file) for file in files}


def kept_digest(file: Path, *, cache: Path | None = None) -> str:
    """Return the SHA-256 of a file; of a large one that is as it was, the one that was kept.

    As it was means: path, size and time of the last change are the same.

    Args:
        file: Whose digest.
        cache: Where digests are kept; None is a folder in the user's cache. One that cannot be
            written is no error.
    """
    stat = file.stat()
    if stat.st_size < KEPT_FROM:
        return file_digest(file)
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    kept = (cache or cache_folder()) / "digests" / key.hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = kept.read_text("ascii").strip()
        if len(text) == 64 and set(text) <= set("0123456789abcdef"):
            return text
    found = file_digest(file)
    with contextlib.suppress(OSError):
        write_text(kept, found)
    return found


def write_digests(folder: Path, files: Sequence[Path]) -> None:
    """Note the digests of a checkpoint's files, and of each tensor in them, beside them.

    Args:
        folder: The checkpoint.
        files: Its safetensors files; config.json is noted too.
    """
    document = {
        "algorithm": "sha256",
        "files": file_digests([*files, folder / "config.json"]),
        "tensors": {name: d for file in files for name, d in sorted(tensor_digests(file).items())},
    }
    write_json(folder / DIGESTS, document)


def tensor_digests(file: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes in a safetensors file known to be good."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, dict[str, list[int]]] = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            handle.seek(8 + size + begin)
            digest, left = hashlib.sha256(), end - begin
            while left and (piece := handle.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
            found[name] = digest.hexdigest()
    return found


_verifying: ContextVar[bool] = ContextVar("verifying", default=True)


@contextmanager
def unverified(*, when: bool = True) -> Iterator[None]:
    """Take checkpoints inside the block as they are, without holding them against their digests."""
    token = _verifying.set(_verifying.get() and not when)
    try:
        yield
    finally:
        _verifying.reset(token)


def verifying() -> bool:
    """Say whether checkpoints are held against their digests here."""
    return _verifying.get()
