"""Run the tests that go with what changed, for at most about a minute.

    python scripts/quick.py [--base main] [--seconds 50]

Changed is what differs from the base, committed or not. A changed test file is run itself; a
changed module runs the test files that import it, then those of its folder's name. Tests that do
not fit into the time are skipped and counted: `make test` runs them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ["tests/workspace/test_workspace.py"]


class Deadline:
    """Skips the tests that would begin after it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.skipped = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Skip a test once the time is used up."""
        if time.monotonic() > self.end:
            self.skipped += 1
            pytest.skip("no time left; `make test` runs it")


def changed_files(base: str) -> list[str]:
    """Return the files that differ from `base`, and the new ones that git does not know yet."""
    git = ["git", "-C", str(ROOT)]
    start = subprocess.run(
        [*git, "merge-base", base, "HEAD"], check=False, capture_output=True, text=True
    ).stdout.strip()
    listed = [[*git, "diff", "--name-only", "--diff-filter=d", start or "HEAD"]]
    listed.append([*git, "ls-files", "--others", "--exclude-standard"])
    found: set[str] = set()
    for command in listed:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.update(done.stdout.splitlines())
    return sorted(found)


def module_of(path: str) -> str | None:
    """Return the dotted name of a package's module, `rlo_core.linear.plan`."""
    parts = Path(path).parts
    if len(parts) < 4 or parts[0] != "packages" or parts[2] != "src" or not path.endswith(".py"):
        return None
    return ".".join(parts[3:])[: -len(".py")].removesuffix(".__init__")


def tests_of(changed: list[str], tests: dict[str, str]) -> list[str]:
    """Return the test files to run, the closest first.

    Args:
        changed: Paths relative to the repository.
        tests: The text of every test file, by its path.
    """
    own = [path for path in changed if path in tests]
    importing, beside = [], []
    for name in filter(None, map(module_of, changed)):
        parent, _, last = name.rpartition(".")
        needles = (f"{name} import", f"import {name}", f'"{name}', f"from {parent} import {last}")
        importing += [path for path, text in tests.items() if any(n in text for n in needles)]
        package, *folders = name.removeprefix("rlo_").split(".")
        folder = "/".join(["tests", package, *folders[:1]])
        beside += [
            path
            for path in tests
            if path.startswith(f"{folder}/") or Path(path).stem == f"test_{last}"
        ]
    always = [path for path in ALWAYS if path in tests]
    return list(dict.fromkeys([*own, *importing, *beside, *always]))


def main() -> None:
    """Choose the tests and run them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="main", help="what to compare with")
    parser.add_argument("--seconds", type=float, default=50.0, help="when to stop beginning tests")
    options = parser.parse_args()
    tests = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.glob("tests/**/test_*.py"))
    }
    chosen = tests_of(changed_files(options.base), tests)
    os.chdir(ROOT)
    deadline = Deadline(options.seconds)
    status = pytest.main(["-q", "-x", "--no-header", *chosen], plugins=[deadline])
    if deadline.skipped:
        print(f"{deadline.skipped} tests did not fit into {options.seconds:.0f} s")
    sys.exit(status)


if __name__ == "__main__":
    main()
