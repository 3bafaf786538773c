"""Digests of whole files, kept for large ones so that a run that goes on does not read them
again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from rlo_core.files import write_text

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
