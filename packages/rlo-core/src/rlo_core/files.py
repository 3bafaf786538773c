"""Files are written whole or not at all, and what a killed writer left behind can be told apart."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.(\d+)\.\w{8}\.tmp")
_being_written: set[Path] = set()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success sync it and put it in place.

    A reader sees the old file or the new one, never a part; on an exception nothing is left behind.
    The temporary file is named after this process, so that `remove_leftovers` knows whose it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp"
    )
    os.close(descriptor)
    temporary = Path(name)
    _being_written.add(temporary)
    try:
        yield temporary
        # mkstemp makes files 0600; give the target what an ordinary open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _being_written.discard(temporary)


def _sync_folder(folder: Path) -> None:
    """Have the renames in a folder reach the disk in their order, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows opens no folder; some network disks sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str], *, deep: bool = True) -> list[Path]:
    """Remove the temporary files of `atomic_path` in `folder` whose process has ended.

    Call it while no other process begins to write there (see `rlo_core.runs.folder`).

    Args:
        folder: Where to look.
        deep: Look in the folders below too.

    Returns:
        What was removed.
    """
    removed = []
    find = Path(folder).rglob if deep else Path(folder).glob
    for path in sorted(find(".*.tmp")):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or path in _being_written:
            continue
        # In a container process numbers come again: a file with ours that we do not know is old.
        if int(found[1]) == os.getpid() or not _alive(int(found[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _alive(process: int) -> bool:
    if os.name == "nt":  # there os.kill ends a process, whatever the signal
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with the line ends it has."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write `document` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(document, indent=2, sort_keys=False, default=str) + "\n")
