"""What this package uses of its peers that they do not promise: all of it is named here.

The upper bounds in pyproject.toml are there because of it, and a test says which peer has lost one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PRIVATE: tuple[tuple[str, str, str, str], ...] = (
    ("torch", "2.15.0", "torch", "Tensor._version"),
    ("transformers", "5.23.0", "transformers", "PretrainedConfig._name_or_path"),
)
"""Peer, the version in which it was seen, module, name (with dots for what is in a class)."""


def writes_to(tensor: Tensor) -> int:
    """Return how many times a tensor's memory was written in place."""
    return int(tensor._version)


def folder_of(config: Any) -> str:
    """Return what a model was loaded from, as its configuration says."""
    return str(config._name_or_path)
