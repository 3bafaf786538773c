"""What a reader copies out of a page works: Python runs, commands exist and take their options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

sys.path.insert(0, str(Path(__file__).parent))
from pages import blocks, commands, pages

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(page.relative_to(ROOT)): page for page in pages(ROOT)}
WITH_PYTHON = [name for name, page in PAGES.items() if blocks(page, "python")]
WITH_COMMANDS = [name for name, page in PAGES.items() if commands(page)]
# Pages whose code opens a model that an earlier command made.
NEEDS_A_MODEL = {
    "docs/guides/quantization.md": ("MODEL", "DIR"),
    "docs/how-to/finetune-and-quantize.md": ("MODEL", "opt-ce-2bit"),
}


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model with random weights, and the same at 2 bits: what the pages' commands leave."""
    folder = tmp_path_factory.mktemp("models")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quantize_and_generate.py"), "--steps", "1"],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    return folder / "runs" / "example-lm" / "model", folder / "runs" / "example-lm" / "2bit"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in NEEDS_A_MODEL else name
        for name in WITH_PYTHON
    ],
)
@pytest.mark.filterwarnings("default")
def test_the_python_of_a_page_runs_as_it_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in NEEDS_A_MODEL:
        made = request.getfixturevalue("quantized")
        for link, target in zip(NEEDS_A_MODEL[name], made, strict=True):
            (tmp_path / link).symlink_to(target)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(PAGES[name], "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(PAGES[name]), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_every_command_of_a_page_exists_and_takes_its_options(name: str) -> None:
    for line, command in commands(PAGES[name]):
        problem = _problem(shlex.split(command))
        assert problem is None, f"{name}:{line}: {command}: {problem}"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("rlo-gptq quantize MODEL DATA --wbits 2 --save DIR", None),
        ("torchrun --nproc-per-node=2 -m rlo_gptq quantize MODEL DATA --save DIR", None),
        ("rlo-gptq quantize MODEL DATA --bitwidth 2", "No such option"),
        ("rlo-gptq squeeze MODEL", "No such command 'squeeze'"),
        ("rlo-gptq quantize MODEL DATA --wbits 7", "'7' is not one of"),
        ("make tea", "no target 'tea'"),
        ("pip install 'rlo-hf[alle]'", "no extra 'alle'"),
        ("cargo run", "not a command of this suite"),
    ],
)
def test_the_check_of_commands_sees_what_does_not_exist(command: str, problem: str | None) -> None:
    found = _problem(shlex.split(command))
    assert found is None if problem is None else found is not None and problem in found


def _problem(words: list[str]) -> str | None:
    """Return what is wrong with a command, without running it."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    first, rest = words[0], words[1:]
    if first == "torchrun":
        module = rest[rest.index("-m") + 1]
        return _problem([module.replace("_", "-"), *rest[rest.index("-m") + 2 :]])
    if first == "make":
        makefile = (ROOT / "Makefile").read_text()
        missing = [t for t in rest if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)]
        return f"no target {missing[0]!r}" if missing else None
    if first == "pip":
        return _pip_problem([w for w in rest[1:] if not w.startswith("-")])
    if first in ("python", ".venv/bin/python"):
        script = rest[0]
        return None if (ROOT / script).is_file() or script == "-m" else f"no file {script!r}"
    if first in ("git", "cd"):
        return None
    scripts = {e.name: e for e in entry_points(group="console_scripts") if "rlo_" in e.value}
    if first not in scripts:
        return "not a command of this suite"
    if first == "timm":
        return None if rest and rest[0].endswith(".py") else "timm takes a script"
    return _click_problem(scripts[first].load(), rest, first)


def _click_problem(command: click.Command, words: list[str], path: str) -> str | None:
    try:
        context = command.make_context(path, list(words))
        if isinstance(command, click.Group):
            arguments = [*context._protected_args, *context.args]
            name, child, left = command.resolve_command(context, arguments)
            assert child is not None
            return _click_problem(child, left, f"{path} {name}")
    except click.exceptions.Exit:
        return None
    except click.UsageError as error:
        # A page's file or folder is not there; that it is asked for is right.
        return None if "does not exist" in error.message else error.message
    return None


def _pip_problem(names: list[str]) -> str | None:
    for name in names:
        wanted = Requirement(Path(name).name if name.startswith("./packages/") else name)
        path = ROOT / "packages" / wanted.name / "pyproject.toml"
        if not path.exists():
            continue  # somebody else's package
        extras = tomllib.loads(path.read_text())["project"].get("optional-dependencies", {})
        for extra in wanted.extras - set(extras):
            return f"{wanted.name} has no extra {extra!r}"
    return None


@pytest.mark.slow
def test_the_commands_of_the_readme_that_need_no_network_run(tmp_path: Path) -> None:
    command = next(c for _, c in commands(ROOT / "README.md") if c.startswith("rlo-timm train"))
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_links_between_the_readme_the_packages_and_the_documentation_lead_somewhere() -> None:
    for page in [*PAGES.values(), ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
