"""Break the code in small ways, one at a time, and see whether its tests notice.

    python scripts/mutants.py [--count 300] [--seed 0] [--packages rlo-core,rlo-stylegan]
                              [--minutes 10] [--only PART] [--out benchmarks/results/mutants.jsonl]

A mutant is one change of one module: a comparison, an operator, a number, a condition, a returned
value or a call that is left out. It is judged by the fast tests of its module, the closest first
(`scripts/quick.py` says which), until one fails. The file of results is resumed: what is in it is
not tried again. No file of the code is touched: a process that has the libraries loaded forks, and
the child imports the module with its changed text. A test that starts another Python sees the code
as it is, so a mutant that only such a test could notice counts as missed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from quick import ALWAYS, module_of, tests_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
LOADED = {
    "rlo-core": ("torch", "numpy", "click", "hypothesis", "sklearn.linear_model"),
    "rlo-stylegan": ("torch", "click", "libcst"),
    "rlo-gptq": ("torch", "numpy", "click", "transformers", "safetensors.torch"),
    "rlo-hf": ("torch", "click", "transformers", "accelerate"),
    "rlo-timm": ("torch", "click", "timm", "lightning.pytorch"),
}
"""What the tests of a package import besides us, loaded once."""
SWAPS: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.Pow: "*", ast.And: "or", ast.Or: "and",
}  # fmt: skip
SECONDS = 60
"""Of processor time for one mutant at most; one that uses them up gets no verdict."""


@dataclass(frozen=True)
class Mutant:
    """One change: `before` at an offset of a file becomes `after`."""

    package: str
    file: str
    line: int
    start: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What tells it apart from all others, as long as the file is the same."""
        return f"{self.file}:{self.line}:{self.start}:{self.before}->{self.after}"

    def applied(self, text: str) -> str:
        """Return the file's text with the change."""
        assert text[self.start : self.start + len(self.before)] == self.before
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


class Sites(ast.NodeVisitor):
    """Finds the changes of a module; leaves annotations, decorators and messages alone."""

    def __init__(self, package: str, file: str, text: str) -> None:
        self.package, self.file, self.text = package, file, text
        lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))
        self.lines = lines
        self.found: list[Mutant] = []
        self.visit(ast.parse(text))

    def offset(self, line: int, column: int) -> int:
        """Return a place in the text; ast counts columns in bytes."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Return where a node begins and ends in the text."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.offset(node.lineno, node.col_offset),
            self.offset(node.end_lineno, node.end_col_offset),
        )

    def add(self, start: int, end: int, after: str) -> None:
        """Note a change of the text between two places."""
        before = self.text[start:end]
        line = self.text.count("\n", 0, start) + 1
        if before != after and before.strip():
            self.found.append(Mutant(self.package, self.file, line, start, before, after))

    def swap(self, left: ast.expr, right: ast.expr, operator: ast.AST) -> None:
        """Replace the operator between two expressions."""
        start, end = self.span(left)[1], self.span(right)[0]
        between = self.text[start:end]
        symbol = between.strip(" ()\n\\")
        if type(operator) in SWAPS and symbol and "#" not in between:
            at = start + between.index(symbol)
            self.add(at, at + len(symbol), SWAPS[type(operator)])

    def visit_Compare(self, node: ast.Compare) -> None:
        """Turn each comparison."""
        operands = [node.left, *node.comparators]
        for i, operator in enumerate(node.ops):
            self.swap(operands[i], operands[i + 1], operator)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Change the arithmetic; `|` of types and texts are left."""
        if not any(isinstance(side, ast.JoinedStr) for side in (node.left, node.right)):
            self.swap(node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Turn `and` and `or`."""
        self.swap(node.values[0], node.values[1], node.op)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Leave out `not` and the sign."""
        if isinstance(node.op, (ast.Not, ast.USub)):
            start, end = self.span(node)
            self.add(start, end, self.text[slice(*self.span(node.operand))])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Turn truths, and make numbers one larger."""
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(start, end, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.add(start, end, repr(node.value + 1))

    def visit_If(self, node: ast.If) -> None:
        """Turn a condition."""
        test = ast.unparse(node.test)
        if "TYPE_CHECKING" in test or "__main__" in test:
            return
        start, end = self.span(node.test)
        self.add(start, end, f"not ({self.text[start:end]})")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        """Return nothing."""
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self.add(*self.span(node.value), "None")
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Leave out a call whose result nobody uses; docstrings are no code."""
        if isinstance(node.value, ast.Call):
            self.add(*self.span(node), "pass")
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave messages alone; tests of what is raised turn its condition."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave assertions alone: they tell a type checker what is so."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Look at the value only."""
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look at defaults and body only."""
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look at the body only."""
        for statement in node.body:
            self.visit(statement)


def all_mutants(package: str) -> list[Mutant]:
    """Return every change of a package's modules."""
    found = []
    for path in sorted((ROOT / "packages" / package / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found += Sites(package, path.relative_to(ROOT).as_posix(), text).found
    return found


def sample(packages: tuple[str, ...], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants drawn at random, as many of each package, taking turns."""
    share = -(-count // len(PACKAGES))
    drawn = []
    for package in PACKAGES:
        chance = random.Random(f"{seed} {package}")
        mutants = all_mutants(package)
        drawn.append(chance.sample(mutants, min(share, len(mutants))))
    turns = [m[i] for i in range(share) for m in drawn if i < len(m)]
    return [mutant for mutant in turns[:count] if mutant.package in packages]


class Changed(importlib.machinery.SourceFileLoader):
    """Loads one module from a text that is not in its file."""

    text = ""

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        """Compile the changed text; no cache is read or written."""
        return self.source_to_code(self.text.encode(), self.path)


def import_changed(mutant: Mutant) -> None:
    """Have this process import the mutant in the place of its module."""
    path = ROOT / mutant.file
    changed = mutant.applied(path.read_text(encoding="utf-8"))
    name = module_of(mutant.file)
    assert name is not None

    class Finder:
        @staticmethod
        def find_spec(wanted: str, *_: object) -> importlib.machinery.ModuleSpec | None:
            if wanted != name:
                return None
            loader = Changed(wanted, str(path))
            loader.text = changed
            locations = [str(path.parent)] if path.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                wanted, path, loader=loader, submodule_search_locations=locations
            )

    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


class FirstFailure:
    """Writes down which test failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the first."""
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def run_tests(tests: list[str], mutant: Mutant | None) -> tuple[int, float, str]:
    """Run tests in a child; return pytest's status, processor seconds and the test that failed."""
    temporary = Path(tempfile.mkdtemp())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        status = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            signal.alarm(SECONDS * 10)  # one that sleeps
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if mutant is not None:
                import_changed(mutant)
            import pytest

            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temporary)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            arguments = [*options, f"--basetemp={temporary}/t", *tests]
            status = int(pytest.main(arguments, plugins=[FirstFailure(temporary / "failed")]))
        except BaseException:
            status = 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    failed = temporary / "failed"
    named = failed.read_text() if failed.exists() else ""
    shutil.rmtree(temporary, ignore_errors=True)
    return status, round(used, 2), named


def chosen_tests(file: str, tests: dict[str, str]) -> list[str]:
    """Return the test files of a module: its namesake first, those that import it.

    Where there are fewer than three, those of its folder follow, then those of its package.
    """
    found = [path for path in tests_of([file], tests) if path not in ALWAYS]
    stem, name = Path(file).stem.strip("_"), module_of(file)
    near = [path for path in found if stem in Path(path).stem or f"{name} import" in tests[path]]
    if len(near) < 3:
        package = file.split("/")[1].removeprefix("rlo-")
        own = [path for path in tests if Path(path).parent == Path("tests") / package]
        near += [path for path in dict.fromkeys([*found, *own]) if path not in near]
    return sorted(near, key=lambda path: stem not in Path(path).stem)


def judge(mutants: list[Mutant], out: Path, seconds: float, seed: int) -> None:
    """Try the mutants of one package that are not in the file of results yet, for some time."""
    done = {record.get("key") for record in read(out)}
    tests = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.glob("tests/**/test_*.py"))
    }
    if not out.exists():
        from rlo_core.runs.record import machine, versions

        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        header = {"benchmark": "mutants", "when": when, "machine": machine(), "seed": seed}
        out.write_text(json.dumps({**header, "versions": versions()}) + "\n")
    end = time.monotonic() + seconds
    clean: dict[str, bool] = {}
    for mutant in mutants:
        if time.monotonic() > end:
            return
        if mutant.key in done:
            continue
        files = chosen_tests(mutant.file, tests)
        record: dict[str, object] = {"key": mutant.key, **asdict(mutant), "caught": False}
        if files:
            status, used, failed = run_tests(files, mutant)
            caught = None if status < 0 else status not in (0, 5)
            record |= {"caught": caught, "status": status, "seconds": used, "by": failed}
            if failed and failed not in clean:
                clean[failed] = run_tests([failed], None)[0] == 0
            if not clean.get(failed, True):
                record |= {"caught": None, "why": "the test fails without the change too"}
        with out.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        verdict = {True: "caught", False: "MISSED", None: "no verdict"}[record["caught"]]  # type: ignore[index]
        print(f"{verdict} {mutant.key!r}", flush=True)


def read(out: Path) -> list[dict[str, object]]:
    """Return the records of a file of results, without its first line."""
    if not out.exists():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()[1:]]


def summary(records: list[dict[str, object]]) -> Iterator[str]:
    """Yield a line for each package: how many were caught of how many that were judged."""
    for package in PACKAGES:
        own = [r for r in records if r["package"] == package and r["caught"] is not None]
        caught = sum(bool(r["caught"]) for r in own)
        yield f"{package}: {caught} of {len(own)} caught"


def main() -> None:
    """Draw, judge, say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mutants of all packages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", default=",".join(PACKAGES))
    parser.add_argument("--minutes", type=float, default=10.0, help="when to begin no other one")
    parser.add_argument("--only", default="", help="modules whose path has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.jsonl")
    options = parser.parse_args()
    packages = tuple(options.packages.split(","))
    os.chdir(ROOT)
    drawn = sample(packages, options.count, options.seed)
    end = time.monotonic() + options.minutes * 60
    for package in packages:
        mutants = [m for m in drawn if m.package == package and options.only in m.file]
        for name in LOADED[package]:
            importlib.import_module(name)
        share = (end - time.monotonic()) / (len(packages) - packages.index(package))
        judge(mutants, options.out, share, options.seed)
    for line in summary(read(options.out)):
        print(line)


if __name__ == "__main__":
    main()
