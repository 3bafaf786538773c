"""What holds for the repository as a whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PACKAGES = ["rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan"]


def project(root: Path, package: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(
        (root / "packages" / package / "pyproject.toml").read_text()
    )
    return table["project"]  # type: ignore[no-any-return]


@pytest.fixture
def core_version(root: Path) -> Version:
    return Version(project(root, "rlo-core")["version"])


@pytest.mark.parametrize("package", PACKAGES)
def test_all_packages_have_one_version(root: Path, package: str, core_version: Version) -> None:
    assert Version(project(root, package)["version"]) == core_version
    module = package.replace("-", "_")
    source = (root / "packages" / package / "src" / module / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    assert Version(found[1]) == core_version


def test_the_workspace_has_the_version_of_its_packages(root: Path, core_version: Version) -> None:
    table = tomllib.loads((root / "pyproject.toml").read_text())
    assert Version(table["project"]["version"]) == core_version


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_plugin_asks_for_the_core_of_its_own_minor_version(
    root: Path, package: str, core_version: Version
) -> None:
    core = [
        requirement
        for requirement in map(Requirement, project(root, package)["dependencies"])
        if requirement.name == "rlo-core"
    ]
    major, minor = core_version.release[:2]
    assert [requirement.specifier for requirement in core] == [
        Requirement(f"rlo-core>={major}.{minor},<{major}.{minor + 1}").specifier
    ]


FRAMEWORKS = {"llamafactory", "ms-swift", "axolotl", "torchtitan"}
"""They bring their own versions of everything: a user has one already, and no extra asks for it."""


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_the_ranges_that_the_doctor_checks_are_those_that_the_package_asks_for(
    root: Path, package: str
) -> None:
    metadata = project(root, package)
    # An extra may ask for more of what the package asks for anyway.
    lines = chain(*metadata.get("optional-dependencies", {}).values(), metadata["dependencies"])
    asked = {wanted.name: wanted.specifier for wanted in map(Requirement, lines)}
    host = importlib.import_module(f"{package.replace('-', '_')}.host").HOST
    for name, range_ in {**host.requires, **host.optional}.items():
        if name in FRAMEWORKS:
            assert name not in asked
        else:
            assert SpecifierSet(range_) == asked[name], name


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_has_readme_changelog_and_licence(root: Path, package: str) -> None:
    folder = root / "packages" / package
    licence = (folder / "LICENSE").read_text()
    assert "Apache License" in licence
    assert licence == (root / "LICENSE").read_text()
    for name in ("README.md", "CHANGELOG.md"):
        assert (folder / name).read_text().strip()
    assert (folder / "src" / package.replace("-", "_") / "py.typed").exists()
    metadata = project(root, package)
    assert metadata["license"] == "Apache-2.0"
    assert metadata["requires-python"] == ">=3.10"


@pytest.mark.parametrize("name", ["dev.txt", "dev-py310.txt"])
def test_locked_versions_are_plain_lines_without_an_address(root: Path, name: str) -> None:
    lines = (root / "constraints" / name).read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", line), line
    names = [line.partition("==")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"torch", "torchvision", "ruff", "mypy", "pytest", "uv"} <= set(names)


def test_no_file_names_an_index_of_packages(root: Path) -> None:
    """An address in a committed file would send every user to that host."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=root, check=False, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(
        r"(--(extra-)?index-url|--find-links)[ =]\S*//|/simple/?\s*$", re.MULTILINE
    )
    for name in tracked.stdout.splitlines():
        path = root / name
        if (
            path.suffix in {".txt", ".toml", ".sh", ".py", ".yml", ".yaml", ".cfg"}
            and path.exists()
        ):
            assert not pattern.search(path.read_text(errors="ignore")), name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_imports_under_its_own_name(package: str) -> None:
    module = importlib.import_module(package.replace("-", "_"))
    assert module.__version__


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    readme = (root / "README.md").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (root / ".ci" / "run").read_text()
