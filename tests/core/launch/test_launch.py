"""The launcher against the interpreter itself: what `python SCRIPT` does is the oracle."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from rlo_core.errors import RLOError
from rlo_core.launch import (
    ScriptError,
    assigns,
    function,
    insert_after,
    insert_before,
    load_script,
    run_script,
    statements,
)

LAUNCH = "import sys; from rlo_core.launch import run_script; run_script(sys.argv[1], sys.argv[2:])"


def write(folder: Path, source: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(source, encoding="utf-8")
    return path


def python(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_script_sees_what_the_interpreter_shows_it(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "from __future__ import annotations\n"
        "import sys, inspect\n"
        "def f() -> unknown: return 1\n"
        "print(__name__, __file__, sys.argv, sys.path[0], __spec__, __package__, __doc__)\n"
        "print(type(__loader__).__name__, inspect.getsource(f), inspect.getsourcelines(f)[1])\n"
        "print(sys.modules['__main__'].f is f, f.__module__, f.__annotations__)\n",
    )
    plain = python(script.name, "--a", "b c", cwd=tmp_path)
    launched = python("-c", LAUNCH, script.name, "--a", "b c", cwd=tmp_path)
    assert plain.returncode == launched.returncode == 0, launched.stderr
    assert launched.stdout == plain.stdout


def test_an_error_shows_the_traceback_that_the_interpreter_shows(tmp_path: Path) -> None:
    script = write(tmp_path, "def f():\n    return 1 / 0\n\n\nf()\n")
    plain = python(script.name, cwd=tmp_path)
    launched = python("-c", LAUNCH, script.name, cwd=tmp_path)
    assert plain.returncode == launched.returncode == 1
    assert launched.stderr == plain.stderr
    assert "line 2, in f" in launched.stderr


def test_line_numbers_stay_those_of_the_file_when_statements_are_injected(tmp_path: Path) -> None:
    script = write(tmp_path, "x = 1\n\n\ndef f():\n    y = 2\n    return 1 / 0\n\n\nf()\n")

    def transform(tree: ast.Module) -> ast.Module:
        body = function(tree, "f")
        assert body is not None
        insert_before(body.body, body.body[1], "import os\nos.getcwd()\nz = [\n 1,\n 2]\n")
        insert_after(tree.body, tree.body[0], "a = 1\nb = 2\n")
        return tree

    tree = load_script(script, transform=transform).tree
    assert [n.lineno for n in tree.body] == [1, 1, 1, 4, 9]
    with pytest.raises(ZeroDivisionError) as caught:
        exec(load_script(script, transform=transform).compile(), {})
    assert [entry.lineno for entry in caught.traceback][1:] == [8, 5]  # pytest counts from 0


def test_spawned_processes_and_pickle_find_what_the_script_defines(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import multiprocessing, pickle, sys\n"
        "class Thing:\n"
        "    def __init__(self, x): self.x = x\n"
        "def double(thing): return Thing(2 * thing.x)\n"
        "if __name__ == '__main__':\n"
        "    assert pickle.loads(pickle.dumps(Thing(1))).x == 1\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [Thing(21)])[0].x)\n",
    )
    done = python("-c", LAUNCH, script.name, cwd=tmp_path)
    assert done.stdout == "42\n", done.stderr


def test_the_interpreter_is_as_it_was_afterwards(tmp_path: Path) -> None:
    before = sys.modules["__main__"], sys.argv, list(sys.path)
    script = write(tmp_path, "import sys\nsys.argv.append('x')\nsys.path.append('y')\n")
    run_script(script, ["--z"])
    assert (sys.modules["__main__"], sys.argv, list(sys.path)) == before


def test_exit_codes_and_interrupts_come_through(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_script(write(tmp_path, "raise SystemExit(3)\n"))
    assert exit_.value.code == 3
    with pytest.raises(KeyboardInterrupt):
        run_script(write(tmp_path, "raise KeyboardInterrupt\n"))


def test_a_known_failure_of_injected_code_comes_through_for_the_command_to_say(
    tmp_path: Path,
) -> None:
    script = write(tmp_path, "from rlo_core.errors import RLOError\nraise RLOError('no')\n")
    with pytest.raises(RLOError, match=r"^no$"):
        run_script(script)


def test_nothing_runs_when_the_transform_refuses(tmp_path: Path) -> None:
    script = write(tmp_path, "open('ran', 'w')\n")

    def refuse(tree: ast.Module) -> ast.Module:
        raise ScriptError("looked for x")

    with pytest.raises(ScriptError, match=r"^looked for x$"):
        run_script(script, transform=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"script must be a file, got '.*missing.py', which is not there"),
        (b"x = 1\ny = (\n", r"script '.*bad.py', line 2, does not parse: '\(' was never closed"),
        (b"\xff\xfe", r"script '.*bad.py'.* does not parse: .*"),
    ],
)
def test_what_is_no_script_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / ("missing.py" if content is None else "bad.py")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScriptError, match=f"^{message}$"):
        load_script(path)


def test_a_byte_order_mark_and_a_coding_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.py"
    path.write_bytes(b"\xef\xbb\xbfx = '\xc3\xa9'\n")
    latin = tmp_path / "latin.py"
    latin.write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    for script in (path, latin):
        scope: dict[str, object] = {}
        exec(load_script(script).compile(), scope)
        assert scope["x"] == "é"


def test_future_imports_of_this_library_do_not_leak_into_the_script(tmp_path: Path) -> None:
    scope: dict[str, object] = {}
    exec(load_script(write(tmp_path, "def f(x: int): pass\n")).compile(), scope)
    assert scope["f"].__annotations__ == {"x": int}  # type: ignore[attr-defined]


def test_injected_statements_are_found_by_what_they_assign() -> None:
    tree = ast.parse("a = parser = 1\nb: int = 2\nparser.x = 3\n")
    assert [assigns(node, "parser") for node in tree.body] == [True, False, False]
    assert assigns(tree.body[1], "b")
    (injected,) = statements("import x", like=tree.body[2])
    assert injected.lineno == 3


def test_the_last_definition_is_the_one_that_counts() -> None:
    tree = ast.parse("def main(): pass\ndef main(): pass\n")
    found = function(tree, "main")
    assert found is tree.body[1]
    assert function(tree, "other") is None


def test_a_class_pickled_by_a_launched_script_is_read_by_a_plain_run(tmp_path: Path) -> None:
    source = (
        "import pickle, sys\n"
        "class Thing: x = 1\n"
        "if sys.argv[1] == 'save':\n"
        "    pickle.dump(Thing(), open('t.pkl', 'wb'))\n"
        "else:\n"
        "    print(pickle.load(open('t.pkl', 'rb')).x)\n"
    )
    script = write(tmp_path, source)
    assert python("-c", LAUNCH, script.name, "save", cwd=tmp_path).returncode == 0
    assert pickle.PROTO in (tmp_path / "t.pkl").read_bytes()[:1]
    assert python(script.name, "load", cwd=tmp_path).stdout == "1\n"
