"""What the script that breaks the code changes; a change that tests see is told from none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("resource")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CODE = '''"""A docstring with 1 < 2."""
LIMIT: int = 3


def clipped(x: float, *, top: float = 1.0) -> float:
    """Return x, at most top."""
    if x > top and not x == LIMIT:
        log(x)
        return top - 0
    assert x < 5
    return -x
'''


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("mutants", SCRIPTS / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    return module


def test_comparisons_operators_numbers_conditions_results_and_calls_are_changed(
    mutants: ModuleType,
) -> None:
    found = mutants.Sites("p", "m.py", CODE).found
    changes = {(m.before, m.after) for m in found}
    assert changes == {
        ("3", "4"),
        ("1.0", "2.0"),
        (">", ">="),
        ("and", "or"),
        ("not x == LIMIT", "x == LIMIT"),
        ("==", "!="),
        ("x > top and not x == LIMIT", "not (x > top and not x == LIMIT)"),
        ("log(x)", "pass"),
        ("top - 0", "None"),
        ("-", "+"),
        ("0", "1"),
        ("-x", "None"),
        ("-x", "x"),
    }
    for mutant in found:
        changed = mutant.applied(CODE)
        assert changed != CODE
        compile(changed, "m.py", "exec")
    assert len({mutant.key for mutant in found}) == len(found)


def test_a_sample_is_the_same_twice_and_of_all_packages_alike(mutants: ModuleType) -> None:
    first = mutants.sample(mutants.PACKAGES, 50, 7)
    assert first == mutants.sample(mutants.PACKAGES, 50, 7)
    assert first != mutants.sample(mutants.PACKAGES, 50, 8)
    assert {m.package: 0 for m in first}.keys() == set(mutants.PACKAGES)
    assert len(first) == 50
    for mutant in first:
        text = (SCRIPTS.parent / mutant.file).read_text()
        assert mutant.applied(text).count("\n") <= text.count("\n")


@pytest.mark.slow
def test_a_change_that_its_tests_see_is_caught_and_no_change_is_not(mutants: ModuleType) -> None:
    file = "packages/rlo-core/src/rlo_core/schedules.py"
    text = (SCRIPTS.parent / file).read_text()
    start = text.index("progress >= self.warmup")
    wrong = mutants.Mutant("rlo-core", file, 1, start, "progress >=", "progress <")
    same = mutants.Mutant("rlo-core", file, 1, start, "progress >=", "progress >=")
    tests = ["tests/core/test_schedules.py"]
    assert mutants.run_tests(tests, wrong)[0] == 1
    assert mutants.run_tests(tests, same)[0] == 0
