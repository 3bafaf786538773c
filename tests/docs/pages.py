"""The code blocks of the README and of the documentation's pages."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^([ ]*)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the line that it begins in, and its text."""

    language: str
    line: int
    text: str


def pages(root: Path) -> list[Path]:
    """Return the README, the packages' and every page of the documentation."""
    found = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("packages/*/README.md")]
    found += [p for p in root.glob("docs/**/*.md") if "_build" not in p.parts]
    return sorted(path for path in found if path.exists())


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the page's blocks in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[2], text.count("\n", 0, found.start()) + 2, textwrap.dedent(found[3]))
        for found in _BLOCK.finditer(text)
        if found[2] in languages
    ]


def commands(page: Path) -> list[tuple[int, str]]:
    """Return the commands of the page's `sh` blocks, each with its line."""
    found = []
    for block in blocks(page, "sh"):
        joined = block.text.replace("\\\n", "  ")
        for offset, line in enumerate(joined.splitlines()):
            command = re.sub(r"\s#.*$", "", line).strip()
            if command and not command.startswith("#"):
                found.append((block.line + offset, command))
    return found
