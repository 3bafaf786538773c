"""What a repair of the layer `compat` is."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import ClassVar, Literal

import libcst as cst
from libcst.metadata import PositionProvider

Level = Literal["stops", "slow", "note"]
"""What a thing does to a training run: stops it, makes it slow, or neither."""


class Repair(cst.CSTTransformer):
    """A codemod of one module that notes the lines that it changed."""

    METADATA_DEPENDENCIES = (PositionProvider,)
    title: ClassVar[str]
    why: ClassVar[str]
    level: ClassVar[Level] = "stops"
    pattern: ClassVar[re.Pattern[bytes]]
    """A file without it needs no look: building a syntax tree takes a second for a long one."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.module = module
        self.lines: list[int] = []

    @staticmethod
    @abstractmethod
    def needed() -> bool:
        """Tell whether the installed packages call for it."""

    def note(self, node: cst.CSTNode) -> None:
        """Remember the line of a node of the original tree."""
        self.lines.append(self.get_metadata(PositionProvider, node).start.line)
