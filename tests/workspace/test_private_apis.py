"""What we use of our peers without a promise is in `_compat`, is still there, and is bounded."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = ("core", "timm", "hf", "gptq")
SKLEARN = ("core", "rlo_core.linear_model._compat")
PRIVATE = [
    pytest.param(package, *entry, id=f"{package} {entry[0]} {entry[3]}")
    for package, module in (*((p, f"rlo_{p}._compat") for p in PACKAGES), SKLEARN)
    for entry in importlib.import_module(module).PRIVATE
]


@pytest.mark.parametrize(("package", "peer", "seen", "module", "name"), PRIVATE)
def test_what_is_private_of_a_peer_is_still_there(
    package: str, peer: str, seen: str, module: str, name: str
) -> None:
    if peer == "trl":
        pytest.importorskip("trl")
    found: object = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        found = getattr(found, part)
    there = hasattr(found, last)
    if not there and inspect.isclass(found):  # an attribute that __init__ sets
        there = any(f"self.{last}" in inspect.getsource(base) for base in found.__mro__[:-1])
    assert there, (
        f"{peer} has no {module}.{name} any more (it had in {seen}): rlo_{package}._compat"
    )


@pytest.mark.parametrize(("package", "peer", "seen", "module", "name"), PRIVATE)
def test_a_peer_whose_private_names_are_used_has_an_upper_bound(
    root: Path, package: str, peer: str, seen: str, module: str, name: str
) -> None:
    if peer == "python":
        return
    import tomllib

    text = (root / "packages" / f"rlo-{package}" / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"]]
    for extra in project.get("optional-dependencies", {}).values():
        lines += extra
    asked = [wanted for wanted in map(Requirement, lines) if wanted.name == peer]
    assert asked, f"rlo-{package} asks for no {peer}"
    for wanted in asked:
        bounds = [one for one in wanted.specifier if one.operator == "<"]
        assert bounds, f"{wanted} has no upper bound"
        assert Version(seen) in wanted.specifier


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield imports of private names and modules, and private attributes of imported modules."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.partition(".")[0] == "__future__" or node.module.startswith("rlo_"):
                continue
            imported |= {alias.asname or alias.name for alias in node.names}
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield node.lineno, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                inner = inner.value
            dunder = node.attr.startswith("__")
            if isinstance(inner, ast.Name) and inner.id in imported and not dunder:
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("package", [*PACKAGES, "stylegan"])
def test_only_compat_touches_what_is_private_of_a_peer(root: Path, package: str) -> None:
    source = root / "packages" / f"rlo-{package}" / "src"
    found = [
        f"{path.relative_to(source)}:{line}: {text}"
        for path in sorted(source.rglob("*.py"))
        if path.name != "_compat.py"
        for line, text in private_uses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_search_for_private_uses_finds_them() -> None:
    code = "import torch\nfrom timm.models import _hub\ntorch._C._x()\ntorch.nn.Linear\n"
    assert [line for line, _ in private_uses(ast.parse(code))] == [2, 3, 3]


pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="reads TOML with tomllib")
