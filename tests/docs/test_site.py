"""The documentation is whole: every public module has its reference, every page is in the site."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_module_has_a_reference(package: str) -> None:
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    text = (ROOT / "packages" / package / "PUBLIC_API.txt").read_text(encoding="utf-8")
    for module in re.findall(r"^module (\S+)$", text, re.MULTILINE):
        if module != "rlo_core":  # its names are those of its modules
            assert f"## {module}\n" in page, module


def test_every_page_is_reached_from_the_first_one() -> None:
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.glob("**/*.md")} - {"index.md"}
    listed = re.findall(r"^([\w/-]+)$", (docs / "index.md").read_text(), re.MULTILINE)
    assert {f"{name}.md" for name in listed} >= pages


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("the group `docs` is not installed; `make docs` installs it")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rlo_core.functional.rooted_loss" in (tmp_path / "api" / "rlo-core.html").read_text()
