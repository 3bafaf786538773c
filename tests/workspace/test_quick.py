"""`make quick` chooses the tests that go with a change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def quick(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quick", root / "scripts" / "quick.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = {
    "tests/core/test_links.py": "from rlo_core.links import CE",
    "tests/core/linear/test_fused.py": "from rlo_core.linear import plan",
    "tests/gptq/rounding/test_rounding.py": "from rlo_gptq.rounding.methods import METHODS",
    "tests/gptq/test_cli.py": "import rlo_gptq",
    "tests/workspace/test_workspace.py": "",
}


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ("packages/rlo-core/src/rlo_core/links.py", "tests/core/test_links.py"),
        ("packages/rlo-core/src/rlo_core/linear/plan.py", "tests/core/linear/test_fused.py"),
        (
            "packages/rlo-gptq/src/rlo_gptq/rounding/greedy.py",
            "tests/gptq/rounding/test_rounding.py",
        ),
        ("tests/gptq/test_cli.py", "tests/gptq/test_cli.py"),
        ("README.md", "tests/workspace/test_workspace.py"),
    ],
)
def test_a_changed_file_brings_its_own_tests_first(
    quick: ModuleType, changed: str, first: str
) -> None:
    chosen = quick.tests_of([changed], TESTS)
    assert chosen[0] == first
    assert len(chosen) == len(set(chosen)) < len(TESTS)


def test_the_deadline_skips_what_would_begin_after_it(
    quick: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 70.0])
    monkeypatch.setattr(quick.time, "monotonic", lambda: next(clock))
    deadline = quick.Deadline(60.0)
    deadline.pytest_runtest_setup()
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        deadline.pytest_runtest_setup()
    assert deadline.skipped == 1
