"""A checkout on disk: where it is, what family it is of, and its files as syntax trees."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path

import libcst as cst

from rlo_stylegan.errors import CheckoutError

SCRIPT = "train.py"
LOSS = "training/loss.py"
RECORD = ".rlo-stylegan"


@dataclass(frozen=True)
class Checkout:
    """The folder that holds `train.py` and `training/loss.py`."""

    root: Path

    def read(self, name: str) -> bytes:
        """Return the bytes of a file; `name` has forward slashes.

        Raises:
            CheckoutError: it is not there.
        """
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise CheckoutError(
                f"{self.root / name} cannot be read ({error.strerror or error})"
            ) from error

    def sources(self) -> list[str]:
        """Return every Python file below the root, sorted, hidden folders and caches left out."""
        names = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
            names += [
                (Path(folder) / file).relative_to(self.root).as_posix()
                for file in files
                if file.endswith(".py")
            ]
        return sorted(names)

    def family(self) -> str:
        """Return what the checkout looks like, for a human: nothing is decided on it."""
        if not ((self.root / LOSS).is_file() and (self.root / SCRIPT).is_file()):
            return "incomplete"
        loss, script = self.read(LOSS), self.read(SCRIPT)
        newer = (self.root / "training" / "networks_stylegan3.py").exists()
        if (self.root / "training" / "triplane.py").exists():
            return "eg3d"
        if b"cvD" in loss:
            return f"vision-aided-gan ({'stylegan3' if newer else 'stylegan2'})"
        if b"diffaugment" in loss:
            return "DiffAugment-stylegan2-pytorch"
        if newer:
            return "stylegan3-fun" if b"stylegan2-ext" in script else "stylegan3"
        return "stylegan2-ada-pytorch"


def _is_root(folder: Path) -> bool:
    # A checkout on record stays one when a file of it was removed since.
    recorded = (folder / RECORD / "ledger.json").is_file()
    return recorded or ((folder / SCRIPT).is_file() and (folder / LOSS).is_file())


def find_checkout(path: str | os.PathLike[str]) -> Checkout:
    """Return the checkout at `path`, which may be the folder, a folder around it, or its train.py.

    Raises:
        CheckoutError: there is none, or there is more than one.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    if not folder.is_dir():
        raise CheckoutError(f"checkout must be a folder, got {str(path)!r}, which is not there")
    if _is_root(folder):
        return Checkout(folder.resolve())
    below = sorted(child for child in folder.iterdir() if child.is_dir() and _is_root(child))
    if len(below) == 1:
        return Checkout(below[0].resolve())
    if below:
        raise CheckoutError(
            f"{str(path)!r} holds more than one checkout ({', '.join(c.name for c in below)}); "
            "name one of them"
        )
    raise CheckoutError(
        f"{str(path)!r} is no StyleGAN checkout: looked for {SCRIPT} and {LOSS} there and one "
        f"folder below, found {_found(folder)}"
    )


def _found(folder: Path) -> str:
    found = [name for name in (SCRIPT, LOSS) if (folder / name).is_file()]
    return " and ".join(found) if found else "neither"


def parse(source: bytes, name: str) -> cst.Module:
    """Return the syntax tree of a file; printing it gives the very bytes back.

    Raises:
        CheckoutError: it is not Python, or does not survive the round trip.
    """
    try:
        module = cst.parse_module(source)
    except (cst.ParserSyntaxError, UnicodeDecodeError) as error:
        raise CheckoutError(f"{name} does not parse as Python{_line(source)}") from error
    if module.bytes != source:
        raise CheckoutError(f"{name} cannot be kept byte for byte; nothing was written")
    return module


def _line(source: bytes) -> str:
    """Return where Python itself sees the mistake: the line of libcst is often the next one."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
    return ""


def dotted(node: cst.BaseExpression | None) -> str:
    """Return `a.b.c` for a chain of names, "" for anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr.value}" if left else ""
    return ""
