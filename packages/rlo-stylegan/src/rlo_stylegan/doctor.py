"""What in a checkout does not run on the installed packages, found without running it."""

from __future__ import annotations

import ast
import importlib
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from rlo_stylegan.checkout import Checkout
from rlo_stylegan.compat import needed_repairs, repair
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.repairs import Level

RESOLVED = ("numpy", "scipy", "PIL", "torch", "torchvision")
"""Packages whose names are looked up: importing them runs no code of the checkout."""
TRAINING = ("train.py", "training/", "torch_utils/", "metrics/", "dnnlib/", "legacy.py")
"""What a training run imports; elsewhere (viewers, notebooks) a missing package is a note."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run will meet.

    Args:
        level: "stops" a training run, makes it "slow", or a "note".
        where: `FILE:LINE`, or what part of the machine.
        what: What is wrong.
        repair: The title of the repair that `--compat` makes, "" where there is none.
    """

    level: Level
    where: str
    what: str
    repair: str = ""


def examine(checkout: Checkout) -> list[Finding]:
    """Return what was found, what stops a run first."""
    found: list[Finding] = []
    repairs = needed_repairs()
    sources = checkout.sources()
    local = {Path(part).stem for name in sources for part in Path(name).parts}
    for name in sources:
        source = checkout.read(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source, filename=name)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            found.append(Finding("stops", f"{name}:{line}", f"does not parse: {error.args[0]}"))
            continue
        try:
            _, places = repair(source, name, repairs)
        except CheckoutError:
            places = []
        repaired = {place.line for place in places}
        found += [
            Finding(
                place.repair.level,
                f"{name}:{place.line}",
                place.repair.why,
                place.repair.title,
            )
            for place in places
        ]
        found += [
            f for f in _names(tree, name, local) if int(f.where.rpartition(":")[2]) not in repaired
        ]
        found += _known(source, name)
    found += _machine(checkout)
    order = {"stops": 0, "slow": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _is_training(name: str) -> bool:
    return name.startswith(TRAINING)


def _guarded(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes inside a `try` and its handlers, where the checkout expects a failure."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for statement in (*node.body, *node.handlers)
        for inner in ast.walk(statement)
    }


def _names(tree: ast.Module, name: str, local: set[str]) -> Iterator[Finding]:
    """Yield imports that are not installed and attributes that installed packages do not have."""
    guarded = _guarded(tree)
    called: dict[str, str] = {}
    level: Level = "stops" if _is_training(name) else "note"
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                called[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if not _installed(alias.name, local):
                    yield Finding(level, f"{name}:{node.lineno}", _not_installed(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if not _installed(node.module, local):
                yield Finding(level, f"{name}:{node.lineno}", _not_installed(node.module))
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                called[alias.asname or alias.name] = whole
                if _lost(whole):
                    yield Finding(
                        level, f"{name}:{node.lineno}", f"{whole} does not exist any more"
                    )
    seen: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node in guarded:
            continue
        chain = _chain(node)
        if not chain or chain[0] not in called:
            continue
        lost = _lost(".".join([called[chain[0]], *chain[1:]]))
        if lost and (lost, node.lineno) not in seen:
            seen.add((lost, node.lineno))
            yield Finding(level, f"{name}:{node.lineno}", f"{lost} does not exist any more")


def _installed(module: str, local: set[str]) -> bool:
    """Tell whether the package of a module is in the checkout or installed."""
    package = module.partition(".")[0]
    return package in local or find_spec(package) is not None


def _not_installed(module: str) -> str:
    return f"package {module.partition('.')[0]!r} is not installed"


def _chain(node: ast.Attribute) -> list[str]:
    names = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return [*reversed([*names, value.id])] if isinstance(value, ast.Name) else []


def _lost(whole: str) -> str:
    """Return the part of a dotted name that its package does not have any more, "" if it is whole.

    Only names of modules are followed: what an object or a class has is not decided here, and
    private names are not judged.
    """
    first, *rest = whole.split(".")
    if first not in RESOLVED or find_spec(first) is None:
        return ""
    found: object = importlib.import_module(first)
    path = first
    for name in rest:
        if not isinstance(found, ModuleType) or name.startswith("_"):
            return ""
        path = f"{path}.{name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = getattr(found, name, None)
            if value is None and not hasattr(found, name):
                try:
                    value = importlib.import_module(path)
                except ImportError:
                    return path
        found = value
    return ""


def _known(source: bytes, name: str) -> Iterator[Finding]:
    """Yield what is slower on today's torch but right."""
    text = source.decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if "__version__.startswith" in line and "'1." in line:
            yield Finding(
                "slow",
                f"{name}:{number}",
                f"takes its fast path on torch 1 only; torch {version('torch')} takes torch's own "
                "operator: right, and slower where a second derivative is needed",
            )


def _machine(checkout: Checkout) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("stops", "machine", "no CUDA device: the training loop asks for one by name")
    if any((checkout.root / "torch_utils" / "ops").glob("*.cu")):
        missing = [tool for tool in ("ninja", "nvcc") if shutil.which(tool) is None]
        missing += (
            [] if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))) else ["a C++ compiler"]
        )
        if missing:
            yield Finding(
                "slow",
                "machine",
                f"no {', no '.join(missing)}: the custom operators cannot be built and slow "
                "reference code runs instead",
            )
