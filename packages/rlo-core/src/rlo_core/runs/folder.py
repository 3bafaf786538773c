"""One writer for each run folder.

The lock is the operating system's, on a small file in the folder, so that a process that is killed
releases it, and it says who holds it. Whoever has the lock starts from a clean folder: temporary
files of dead processes are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rlo_core.errors import RunError
from rlo_core.files import remove_leftovers

LOCK_FILE = ".rlo.lock"
"""In the folder while a process writes there. Alone it says nothing: a killed process leaves it."""

_held: set[int] = set()


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Keep `folder` for this process while the block runs; make it if it is not there.

    Temporary files that killed processes left in it are removed. A folder that was made here and
    that nothing was written into is removed again, so that a refusal leaves no trace.

    Args:
        folder: What the block writes into. In a run of several processes the first one locks.

    Yields:
        The folder as a path.

    Raises:
        RunError: another process, or another thread of this one, is writing there; it is named.
        OSError: the folder cannot be made or written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from rlo_core.runs.folder import lock_folder
        >>> with lock_folder(Path(tempfile.mkdtemp()) / "run") as folder:
        ...     size = (folder / "weights").write_bytes(b"0")
    """
    path = Path(folder)
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        descriptor = _acquire(path)
        try:
            remove_leftovers(path)
            yield path
        finally:
            _release(descriptor, path / LOCK_FILE)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something by now
                parent.rmdir()


def writer_of(folder: str | os.PathLike[str]) -> str | None:
    """Return who is writing into `folder` right now, in words; None if nobody is."""
    lock = Path(folder) / LOCK_FILE
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor) else _owner(lock)
    finally:
        os.close(descriptor)


def _acquire(folder: Path) -> int:
    lock = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the one before us has just removed the empty folder
            continue
        try:
            if not _try_lock(descriptor):
                raise RunError(
                    f"{str(folder)!r} is being written by {_owner(lock)}; wait for it to end, or "
                    "choose another folder"
                )
            if _is_file(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_process()).encode())
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # locked a file that its holder was removing: try the new one


def _release(descriptor: int, lock: Path) -> None:
    if descriptor not in _held:  # a forked child comes here with its parent's block
        return
    _held.discard(descriptor)
    with contextlib.suppress(OSError):  # Windows removes no open file; an unlocked one is harmless
        if _is_file(descriptor, lock):
            lock.unlink()
    os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30
    """The byte that is locked: what is locked cannot be read, and the text has to be."""

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import errno
    import fcntl

    _NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
    """What a file system without locks says; there a folder goes unguarded, as without this."""

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _forget() -> None:
        """Close the locks in a forked child: its parent's death must release them."""
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=_forget)


def _this_process() -> dict[str, Any]:
    program, *arguments = sys.argv or [""]
    return {
        "process": os.getpid(),
        "machine": platform.node(),
        "command": " ".join([Path(program).name, *arguments])[:120],
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _owner(lock: Path) -> str:
    """Return the holder of a lock in words, as far as it has written itself down."""
    try:
        about = json.loads(lock.read_text(encoding="utf-8"))
        return (
            f"process {about['process']} on {about['machine']} ({about['command']}, since "
            f"{about['since']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
