"""Stop writers at random moments, fill the disk, break files, and count what held.

    python scripts/torture.py [--minutes 2] [--seed 0] [--out benchmarks/results/torture.jsonl]

Each trial is a process of its own that writes a run folder or changes a StyleGAN checkout, and
that is killed, runs out of disk (RLIMIT_FSIZE), or meets another one. Then the folder is looked at:
every file whole, the old one or the new one; nobody locked out; the next process able to finish.
The trials of all kinds take turns until the time is up. POSIX only: it forks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from rlo_core.errors import RLOError
from rlo_core.files import write_json
from rlo_core.runs.folder import LOCK_FILE, lock_folder, writer_of
from rlo_core.runs.record import Run, machine, read_metrics, read_run, versions
from rlo_core.runs.report import write_report

ROOT = Path(__file__).resolve().parent.parent
REFUSED, BUG = 3, 4
"""Exit status of a trial's process that ended in a known failure, or in anything else."""
EPOCHS = 3


def started(work: Callable[[], object], *, disk: int | None = None) -> int:
    """Do some work in a process of its own; `disk` is the size that a file may have there."""
    process = os.fork()
    if process:
        return process
    status = BUG
    try:
        if disk is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
        with contextlib.redirect_stdout(io.StringIO()):
            work()
        status = 0
    except (RLOError, OSError):
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int) -> int:
    """Wait for a process; return its exit status, negative the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_within(process: int, seconds: float, chance: random.Random) -> int:
    """Kill a process at a random moment of that long, if it lives then; return its status."""
    time.sleep(chance.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = ended(process)
    assert status != BUG, "the writer failed with something that is no known failure"
    return status


def write_run(folder: Path, size: int) -> None:
    """Write a run as hosts do: the checkpoint after the records that it knows; go on if there."""
    with lock_folder(folder):
        state = folder / "state.json"
        known = json.loads(state.read_text())["epoch"] if state.exists() else 0
        run = Run.create(folder, kind="torture", resume=bool(known), known={"epoch": known})
        for epoch in range(known + 1, known + EPOCHS + 1):
            run.log(epoch=epoch, value="x" * (size % 997))
            write_json(state, {"epoch": epoch, "weights": [epoch] * size})
        run.finish(epochs=known + EPOCHS)


def check_run(folder: Path) -> None:
    """Check that what a stopped writer left is whole, free, and can be gone on with."""
    assert writer_of(folder) is None, "the lock outlived its process"
    if not folder.exists():
        return
    with lock_folder(folder):
        assert not list(folder.rglob(".*.tmp")), "temporary files are left"
        state = folder / "state.json"
        saved = json.loads(state.read_text()) if state.exists() else {"epoch": 0, "weights": []}
        assert set(saved["weights"]) <= {saved["epoch"]}, "a checkpoint of two epochs"
        if (folder / "run.json").exists():
            read_run(folder)
        epochs = [record["epoch"] for record in read_metrics(folder)]
        assert epochs == list(range(1, len(epochs) + 1)), f"records are {epochs}"
        assert saved["epoch"] <= len(epochs) <= saved["epoch"] + 1, (saved["epoch"], epochs)
    assert not (folder / LOCK_FILE).exists()


def kill_run(folder: Path, chance: random.Random) -> None:
    """A run is killed four times on its way, and the fifth process ends it."""
    size = chance.randrange(2000)
    for _ in range(4):
        killed_within(started(lambda: write_run(folder, size)), 0.02, chance)
        check_run(folder)
    assert ended(started(lambda: write_run(folder, size))) == 0
    check_run(folder)


def full_disk_under_run(folder: Path, chance: random.Random) -> None:
    """The disk is full while a run is written; with room again the next process ends it."""
    size = chance.randrange(2000)
    if chance.random() < 0.5:
        assert ended(started(lambda: write_run(folder, size))) == 0
    status = ended(started(lambda: write_run(folder, size), disk=chance.randrange(8000)))
    assert status in (0, REFUSED), f"status {status}"
    check_run(folder)
    assert ended(started(lambda: write_run(folder, size))) == 0
    check_run(folder)


def two_writers(folder: Path, chance: random.Random) -> None:
    """Of writers that begin at one moment one writes at a time; a refused one changes nothing."""
    size = chance.randrange(500)
    statuses = [ended(p) for p in [started(lambda: write_run(folder, size)) for _ in range(3)]]
    assert set(statuses) <= {0, REFUSED}, statuses
    done = statuses.count(0)
    assert done >= 1
    check_run(folder)
    assert len(list(read_metrics(folder))) == done * EPOCHS


class Checkouts:
    """The bytes of a small StyleGAN checkout as it is, and with each change in force."""

    def __init__(self, home: Path) -> None:
        from rlo_stylegan import apply

        spec = importlib.util.spec_from_file_location(
            "gan_checkouts", ROOT / "tests" / "stylegan" / "conftest.py"
        )
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        self.home = home / "original"
        loss, script = made.FAMILIES["ada"]
        made.write(self.home, made.COMMON)
        made.write(self.home, {"training/loss.py": loss, "train.py": script})
        self.states = {None: self.read(self.home)}
        for compat in (False, True):
            copy = home / f"applied-{compat}"
            shutil.copytree(self.home, copy)
            apply(copy, compat=compat)
            self.states[compat] = self.read(copy)

    def read(self, folder: Path) -> dict[str, bytes]:
        """Return the checkout's own files."""
        files = getattr(self, "states", {}).get(None) or {
            path.relative_to(folder).as_posix(): b"" for path in folder.rglob("*") if path.is_file()
        }
        return {name: (folder / name).read_bytes() for name in files}

    def change(self, folder: Path, state: bool | None) -> None:
        """Bring a checkout to a state: None is reverted, else applied, True with repairs."""
        from rlo_stylegan import apply, revert

        if state is None:
            revert(folder)
        else:
            revert(folder, only="compat")
            apply(folder, compat=state)

    def interrupted(self, folder: Path, chance: random.Random, how: str) -> None:
        """Two changes are stopped one after the other; the third, whatever it is, is whole."""
        shutil.copytree(self.home, folder)
        if chance.random() < 0.5:
            self.change(folder, chance.choice([False, True]))
        for _ in range(2):
            state = chance.choice([None, False, True])
            if how == "kill":
                process = started(lambda state=state: self.change(folder, state))
                killed_within(process, 0.15, chance)
            else:
                room = chance.randrange(12_000)
                process = started(lambda state=state: self.change(folder, state), disk=room)
                status = ended(process)
                assert status in (0, REFUSED), f"status {status}"
            versions = [self.states[key] for key in self.states]
            for name, content in self.read(folder).items():
                assert any(content == version[name] for version in versions), f"{name} is no state"
        state = chance.choice([None, False, True])
        status = ended(started(lambda: self.change(folder, state)))
        assert status == 0, f"the change after two stopped ones ends with status {status}"
        assert self.read(folder) == self.states[state], f"the checkout is not in state {state}"
        assert not list(folder.rglob(".*.tmp"))


def broken_files(folder: Path, chance: random.Random) -> None:
    """A run's files with bytes changed, cut out or doubled make a page, or one line."""
    write_run(folder, 3)
    for name in ("run.json", "metrics.jsonl"):
        data = bytearray((folder / name).read_bytes())
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(data))
            end = at + chance.randrange(1, 40)
            change = chance.randrange(3)
            if change == 0:
                data[at] = chance.randrange(256)
            elif change == 1:
                del data[at:end]
            else:
                data[at:at] = data[at:end]
        (folder / name).write_bytes(data)

    def page() -> None:
        write_report([folder], folder / "page.html")

    status = ended(started(page))
    assert status in (0, REFUSED), "a report ended with a traceback"
    assert (folder / "page.html").exists() == (status == 0)


def torture(seconds: float, seed: int) -> list[dict[str, object]]:
    """Let all trials take turns for some time; return a record for each kind."""
    import jinja2  # noqa: F401 - once, and not in each process

    chance = random.Random(seed)
    found: dict[str, dict[str, object]] = {}
    memory = Path("/dev/shm")  # where a sync costs nothing, more trials fit into the time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        home = Path(temporary)
        checkouts = Checkouts(home)
        trials: dict[str, Callable[[Path, random.Random], None]] = {
            "a run killed four times": kill_run,
            "a run on a full disk": full_disk_under_run,
            "three writers of one run": two_writers,
            "two changes of a checkout killed": lambda f, c: checkouts.interrupted(f, c, "kill"),
            "two changes of a checkout on a full disk": lambda f, c: checkouts.interrupted(
                f, c, "disk"
            ),
            "a report of broken files": broken_files,
        }
        found = {name: {"trial": name, "tried": 0, "held": 0, "failures": []} for name in trials}
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            for name, trial in trials.items():
                number += 1
                record, folder = found[name], home / f"trial-{number}"
                record["tried"] += 1  # type: ignore[operator]
                try:
                    trial(folder, random.Random(chance.randrange(2**31)))
                    record["held"] += 1  # type: ignore[operator]
                except (AssertionError, RLOError, OSError, ValueError, KeyError) as error:
                    record["failures"].append(str(error)[:200])  # type: ignore[attr-defined]
                shutil.rmtree(folder, ignore_errors=True)
    return list(found.values())


def main() -> None:
    """Torture for a while, write the counts, and fail if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/torture.jsonl")
    options = parser.parse_args()
    records = torture(options.minutes * 60, options.seed)
    header = {
        "benchmark": "torture",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "minutes": options.minutes,
        "seed": options.seed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in [header, *records]))
    for record in records:
        print(f"{record['trial']}: {record['held']} of {record['tried']} held")
        for failure in record["failures"]:  # type: ignore[attr-defined]
            print(f"  {failure}")
    sys.exit(any(record["failures"] for record in records))


if __name__ == "__main__":
    main()
