"""Run a user's script as `__main__`, its syntax tree changed in memory and its file left alone.

For hosts whose training script lives with the user. `run_script("train.py", argv, transform=f)`
does what `python train.py ...` does, except that `f` may edit the tree first. The code is compiled
under the real path and injected statements take the line of a neighbour, so tracebacks, `inspect`,
breakpoints and `torch.compile` point at the user's own lines.

Nothing is imported or patched on the script's behalf: what a transform injects is ordinary code,
best an `import` of the host package. Processes that the script spawns (data workers) load the file
as it is on disk, under Python's own rules for `__mp_main__`; the edited code is that of this
process only.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from rlo_core.errors import RLOError

Transform = Callable[[ast.Module], ast.Module]
"""Edits a tree in place or returns another one; raises `ScriptError` for an unknown shape."""


class ScriptError(RLOError):
    """A script that is not there, that does not parse, or whose shape is not recognised."""


@dataclass(frozen=True)
class Script:
    """A parsed script: its absolute path and its tree."""

    path: Path
    tree: ast.Module

    def compile(self) -> CodeType:
        """Return the code object of the tree, under the script's path."""
        return compile(self.tree, str(self.path), "exec", dont_inherit=True)


def load_script(path: str | os.PathLike[str], *, transform: Transform | None = None) -> Script:
    """Parse a script, byte order mark and coding line included, and apply `transform`.

    Raises:
        ScriptError: no such file, not a file, not Python, or refused by `transform`.
    """
    absolute = Path.cwd() / path  # not resolve(): python keeps symbolic links too
    if not absolute.is_file():
        raise ScriptError(f"script must be a file, got {str(path)!r}, which is not there")
    try:
        tree = ast.parse(absolute.read_bytes(), filename=str(absolute))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}," if line else ""
        reason = getattr(error, "msg", None) or error
        raise ScriptError(f"script {str(path)!r}{where} does not parse: {reason}") from error
    if transform is not None:
        tree = ast.fix_missing_locations(transform(tree))
    return Script(absolute, tree)


def statements(source: str, *, like: ast.stmt) -> list[ast.stmt]:
    """Parse statements to inject, and give every node of them the place of `like`.

    Args:
        source: Python statements.
        like: The user's statement whose line a traceback through the injected code shows.
    """
    body = ast.parse(source).body
    for statement in body:
        for node in ast.walk(statement):
            if "lineno" in node._attributes:
                ast.copy_location(node, like)
    return body


def insert_before(body: list[ast.stmt], statement: ast.stmt, source: str) -> None:
    """Insert the statements of `source` into `body` just before `statement`, at its line."""
    index = next(i for i, other in enumerate(body) if other is statement)
    body[index:index] = statements(source, like=statement)


def insert_after(body: list[ast.stmt], statement: ast.stmt, source: str) -> None:
    """Insert the statements of `source` into `body` just after `statement`, at its line."""
    index = next(i for i, other in enumerate(body) if other is statement)
    body[index + 1 : index + 1] = statements(source, like=statement)


def assigns(statement: ast.stmt, name: str) -> bool:
    """Tell whether a statement is `name = ...`, also as one of several targets or annotated."""
    if isinstance(statement, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in statement.targets)
    return (
        isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.target.id == name
    )


def function(tree: ast.Module, *names: str) -> ast.FunctionDef | None:
    """Return the last top-level `def` that has one of the names, the one Python would call."""
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    return found[-1] if found else None


@contextmanager
def _as_main(path: Path, argv0: str, argv: Sequence[str]) -> Iterator[ModuleType]:
    """Put a fresh `__main__` in place for the script at `path`, and the old one back at the end."""
    module = ModuleType("__main__")
    module.__file__ = str(path)
    module.__loader__ = SourceFileLoader("__main__", str(path))
    # As for `python FILE`: no spec, so that multiprocessing takes __file__ to make __mp_main__.
    module.__spec__ = None
    module.__dict__["__cached__"] = None
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    old_main, old_argv, old_path = sys.modules.get("__main__"), sys.argv, sys.path[:]
    sys.modules["__main__"] = module
    sys.argv = [argv0, *argv]
    sys.path.insert(0, str(path.parent))
    try:
        yield module
    finally:
        sys.argv, sys.path[:] = old_argv, old_path
        if old_main is not None:
            sys.modules["__main__"] = old_main


def _from_script(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """Return the part of a traceback that begins in the script, or all of it if none does."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename != str(path):
        start = start.tb_next
    return start or trace


def run_script(
    path: str | os.PathLike[str], argv: Sequence[str] = (), *, transform: Transform | None = None
) -> None:
    """Run a script as `python PATH ARGV...` would, with its tree edited by `transform`.

    The script is `__main__` while it runs, with its own folder first on `sys.path`. `SystemExit`,
    `KeyboardInterrupt` and known failures (`RLOError`) come through. Any other exception is
    reported by `sys.excepthook`, without the launcher's frames, and becomes `SystemExit(1)`.

    Args:
        path: The script.
        argv: Its arguments, without its name.
        transform: Edits the tree before it is compiled.

    Raises:
        ScriptError: as `load_script`; nothing of the script has run then.
    """
    script = load_script(path, transform=transform)
    code = script.compile()
    with _as_main(script.path, os.fspath(path), argv) as module:
        try:
            exec(code, module.__dict__)  # noqa: S102 - the user's own script is what is asked for
        except RLOError:
            raise
        except Exception as error:
            trace = _from_script(error.__traceback__, script.path)
            sys.excepthook(type(error), error.with_traceback(trace), trace)
            raise SystemExit(1) from None
