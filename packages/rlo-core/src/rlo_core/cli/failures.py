"""What a command says of an exception that is the world's fault and not a bug: one line."""

from __future__ import annotations

import errno
import json
import pickle
import sys
import zipfile

from rlo_core.errors import RLOError

_OTHERS = {
    "yaml": ("YAMLError",),
    "safetensors": ("SafetensorError",),
    "zstandard": ("ZstdError",),
    "pyarrow": ("ArrowInvalid",),
}
"""Errors of files, of libraries that a command may have imported by then."""
_WRITERS = ("PytorchStreamWriter", "inline_container")
"""torch.save says of a full disk that an assertion failed, as a RuntimeError."""


def known_failure(error: BaseException) -> str | None:
    """Return the line that a command ends with, or None where the exception is a bug.

    A known failure is our own error, or one of the system or of a file: a disk that is full, a
    folder that cannot be written, a file that is not what its name says.

    Args:
        error: What a command raised.
    """
    if isinstance(error, RLOError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:  # whoever read the output has left; click knows that
            return None
        if error.errno is None or not error.strerror:
            return _first_line(error)
        at = f"{error.filename}: " if error.filename else ""
        return f"{at}{error.strerror}"
    if isinstance(error, pickle.UnpicklingError):
        return f"a checkpoint cannot be read: {_first_line(error)}"
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {_first_line(error)}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8 text: {error.reason}"
    if isinstance(error, (zipfile.BadZipFile, EOFError)):
        return f"a file is not whole: {_first_line(error)}"
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _WRITERS):
        return f"a checkpoint cannot be written, is the disk full? {_first_line(error)}"
    for module, names in _OTHERS.items():
        kinds = tuple(getattr(sys.modules.get(module), name, None) for name in names)
        if isinstance(error, tuple(kind for kind in kinds if kind is not None)):
            return f"a file cannot be read or written: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
