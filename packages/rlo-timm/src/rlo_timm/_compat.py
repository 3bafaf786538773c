"""What this package uses of its peers that they do not promise: all of it is named here.

The upper bounds in pyproject.toml are there because of it, and a test says which peer has lost one.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PRIVATE: tuple[tuple[str, str, str, str], ...] = (
    ("timm", "1.0.31", "timm.models._hub", "save_for_hf"),
    ("python", "3.11", "argparse", "ArgumentParser._actions"),
    ("python", "3.11", "argparse", "ArgumentParser._get_option_tuples"),
)
"""Peer, the version in which it was seen, module, name (with dots for what is in a class)."""


def actions_of(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Return the options and arguments of a parser."""
    return parser._actions


class AbbreviatingParser(argparse.ArgumentParser):
    """A parser that says which options an abbreviation may stand for."""

    def option_tuples(self, option_string: str) -> list[Any]:
        """Return what may be meant by the beginning of an option."""
        return super()._get_option_tuples(option_string)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return self.option_tuples(option_string)


def save_for_hf() -> Callable[..., None]:
    """Return timm's writer of a model folder; imports timm."""
    from timm.models import _hub

    save: Callable[..., None] = _hub.save_for_hf
    return save
