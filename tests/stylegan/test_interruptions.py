"""A change of a checkout stopped at any point, and the change after it stopped at any point too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rlo_stylegan
from click.testing import CliRunner
from rlo_core.errors import RunError
from rlo_core.runs.folder import lock_folder
from rlo_stylegan.checkout import RECORD
from rlo_stylegan.cli import main
from rlo_stylegan.errors import ChangedError
from rlo_stylegan.ledger import Ledger

ORIGINAL = {"train.py": b"train", "training/loss.py": b"loss", "torch_utils/misc.py": b"misc"}
STATES: dict[tuple[str, ...], dict[str, bytes]] = {
    (): {},
    ("loss",): {"train.py": b"train+", "training/loss.py": b"loss+"},
    ("compat", "loss"): {
        "train.py": b"train++",
        "training/loss.py": b"loss+",
        "torch_utils/misc.py": b"misc+",
    },
}


class Stop(BaseException):
    """What a power cut looks like from inside."""


@contextmanager
def stopped_at(point: int | None) -> Iterator[list[int]]:
    """Stop before the n-th step that others can see: a file put in place, removed, or a folder."""
    with pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []

        def before(real: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **options: object) -> object:
                if len(steps) == point:
                    raise Stop
                steps.append(1)
                return real(*arguments, **options)

            return step

        patch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut: a tenth of the time
        patch.setattr(os, "replace", before(os.replace))
        patch.setattr(shutil, "rmtree", before(shutil.rmtree))
        ledger_only = before(lambda path, **_: os.unlink(path))  # noqa: PTH108
        real_unlink = Path.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if path.name == "ledger.json" or path.parent.name == "originals":
                if path.exists():
                    ledger_only(path)
            else:
                real_unlink(path, missing_ok=missing_ok)

        patch.setattr(Path, "unlink", unlink)
        yield steps


def change(root: Path, layers: tuple[str, ...], point: int | None = None) -> int:
    """Bring a checkout to some layers; return the steps made. Stopped, it is silent."""
    with stopped_at(point) as steps:
        try:
            ledger = Ledger.load(root)
            if ledger.layers == layers and ledger.coming is None:
                ledger.close()
            else:
                ledger.change(layers, STATES[layers])
        except Stop:
            pass
    return len(steps)


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in ORIGINAL}


def fresh(folder: Path, layers: tuple[str, ...]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in ORIGINAL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if layers:
        change(folder, layers)
    return folder


@pytest.mark.parametrize(
    ("start", "first"),
    [((), ("loss",)), ((), ("compat", "loss")), (("loss",), ()), (("compat", "loss"), ())],
)
@pytest.mark.parametrize("second", STATES)
def test_every_pair_of_stops_can_be_finished_and_taken_back(
    tmp_path: Path, start: tuple[str, ...], first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    root = tmp_path / "checkout"
    total = change(fresh(root, start), first)
    pairs = 0
    for one in range(total):
        change(fresh(root, start), first, one)
        left = change(root, second)
        for two in range(left):
            change(fresh(root, start), first, one)
            change(root, second, two)
            if (one + two) % 2:  # what comes third: the other way round, or on to the end
                change(root, second)
                assert contents(root) == ORIGINAL | STATES[second]
                assert Ledger.load(root).layers == second
            change(root, ())
            assert contents(root) == ORIGINAL
            assert Ledger.load(root).layers == ()
            pairs += 1
    assert pairs > 10


def test_an_edit_between_two_stops_is_still_refused(tmp_path: Path) -> None:
    root = fresh(tmp_path / "checkout", ())
    change(root, ("loss",), 6)
    change(root, (), 2)
    (root / "train.py").write_bytes(b"mine")
    with pytest.raises(ChangedError, match=r"^train.py changed since"):
        change(root, ())


def test_a_second_process_is_refused_while_one_changes_the_checkout(build, snapshot) -> None:
    root = build()
    before = snapshot(root)
    code = (
        "import sys; from rlo_core.runs.folder import lock_folder\n"
        "with lock_folder(sys.argv[1]):\n    print('in', flush=True); sys.stdin.readline()\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(root / RECORD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    first.stdout.readline()
    result = CliRunner().invoke(main, ["apply", str(root)])
    assert result.exit_code == 1
    assert f"is being written by process {first.pid} on " in result.output
    with pytest.raises(RunError, match="is being written by process"):
        rlo_stylegan.apply(root)
    first.communicate("\n")
    assert snapshot(root) == before
    with lock_folder(root / RECORD):
        pass


@pytest.mark.usefixtures("sampler_repair")
def test_apply_and_revert_are_functions_that_say_what_they_did(build, snapshot) -> None:
    root = build()
    before = snapshot(root)
    planned = rlo_stylegan.apply(root, dry_run=True)
    assert snapshot(root) == before
    done = rlo_stylegan.apply(root)
    assert planned.files == done.files == done.written == ("train.py", "training/loss.py")
    assert (done.layers, planned.written, done.checkout) == (("loss",), (), root.resolve())
    assert planned.diff == done.diff
    assert "+" in done.diff
    assert rlo_stylegan.apply(root).written == ()
    both = rlo_stylegan.apply(root, compat=True)
    assert both.layers == ("compat", "loss")
    assert rlo_stylegan.revert(root, only="compat").layers == ("loss",)
    assert rlo_stylegan.revert(root).layers == ()
    assert snapshot(root) == before
