"""One writer for each run folder, and a clean start after one that was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rlo_core.errors import RunError
from rlo_core.files import atomic_path, remove_leftovers
from rlo_core.runs.folder import LOCK_FILE, lock_folder, writer_of
from rlo_core.runs.record import Run, read_metrics

HOLD = """
import sys, time
from rlo_core.runs.folder import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until it is told to stop, or is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = holder(folder)
    try:
        with pytest.raises(RunError) as caught, lock_folder(folder):
            pytest.fail("two writers")
        message = str(caught.value)
        assert message.startswith(f"{str(folder)!r} is being written by process {first.pid} on ")
        assert f"(-c {folder}, since 20" in message
        assert message.endswith("); wait for it to end, or choose another folder")
        assert "\n" not in message
        assert (writer_of(folder) or "").startswith(f"process {first.pid} on ")
    finally:
        first.communicate("\n")
    assert writer_of(folder) is None
    with lock_folder(folder):
        pass


def test_a_killed_process_releases_its_folder(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    assert writer_of(tmp_path) is None
    with lock_folder(tmp_path):
        assert str(os.getpid()) in (writer_of(tmp_path) or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    with lock_folder(tmp_path):
        child = context.Process(target=stop.wait, args=(60,))
        child.start()
    try:
        with lock_folder(tmp_path):
            assert child.is_alive()
    finally:
        stop.set()
        child.join()


def test_two_threads_do_not_share_a_folder_and_two_folders_are_apart(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            with lock_folder(tmp_path / "a"):
                pass
        except RunError as error:
            refused.append(str(error))

    with lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} " in refused[0]


def test_a_refusal_in_a_new_folder_leaves_no_trace_and_a_written_one_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_folder(tmp_path / "runs" / "a"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "runs" / "a") as folder:
        (folder / "file").write_text("")
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["file"]


def test_of_many_processes_that_want_a_folder_one_at_a_time_has_it(tmp_path: Path) -> None:
    count = """
import sys
from pathlib import Path
from rlo_core.errors import RunError
from rlo_core.runs.folder import lock_folder
folder, number = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 25:
    try:
        with lock_folder(folder):
            number.write_text(str(int(number.read_text()) + 1))
            done += 1
    except RunError:
        pass
"""
    number = tmp_path / "number"
    number.write_text("0")
    command = [sys.executable, "-c", count, str(tmp_path / "run"), str(number)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert number.read_text() == "75"
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_temporary_files_of_dead_processes_are_removed_and_of_live_ones_kept(
    tmp_path: Path,
) -> None:
    write = (
        "import sys; from rlo_core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]):\n    print('in', flush=True); sys.stdin.readline()\n"
    )
    (tmp_path / "deep").mkdir()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", write, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("deep/dead.txt", "live.txt")
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    writers[0].kill()
    writers[0].communicate()
    (tmp_path / ".not-ours.tmp").write_text("")
    with atomic_path(tmp_path / "mine.txt"):
        removed = remove_leftovers(tmp_path)
        assert [path.parent.name for path in removed] == ["deep"]
        assert len(list(tmp_path.glob(".*.tmp"))) == 3
    old = tmp_path / f".mine.txt.{os.getpid()}.abcdefgh.tmp"  # of an earlier process of our number
    old.write_text("")
    with lock_folder(tmp_path):
        assert not old.exists()
        writers[1].communicate("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".not-ours.tmp",
        "deep",
        "live.txt",
        "mine.txt",
    ]


def test_a_file_reaches_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if os.path.isdir(descriptor) else "sync file")  # noqa: PTH112
        if calls[-1] == "sync file":
            assert os.fstat(descriptor).st_size == len("text")
        sync(descriptor)

    def put(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", put)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert calls == ["sync file", "replace", "sync folder"]


def test_a_resumed_run_keeps_the_records_that_its_checkpoint_knows(tmp_path: Path) -> None:
    run = Run.create(tmp_path, kind="test")
    run.log(note="before")
    for epoch in (1, 2, 3):
        run.log(epoch=epoch, ce=float("nan"))
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"epoch": 4, "c')  # killed here
    resumed = Run.create(tmp_path, kind="test", resume=True, known={"epoch": 2})
    resumed.log(epoch=3, ce=0.5)
    assert [record.get("epoch") for record in read_metrics(tmp_path)] == [None, 1, 2, 3]
    assert list(read_metrics(tmp_path))[-1]["ce"] == 0.5
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_line_that_the_disk_has_no_room_for_is_not_written_in_part(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    run = Run.create(tmp_path, kind="test")
    run.log(epoch=1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    code = f"""
import resource, signal
from rlo_core.runs.record import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 5}, resource.RLIM_INFINITY))
try:
    Run({str(tmp_path)!r}).log(epoch=2, ce=0.25)
except OSError as error:
    print(error.strerror)
"""
    assert resource is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout in ("File too large\n", "No space left on device\n")
    assert list(read_metrics(tmp_path)) == [{"epoch": 1}]
    assert (tmp_path / "metrics.jsonl").stat().st_size == size


@pytest.mark.parametrize("out", ["full", "a file"])
def test_a_report_that_cannot_be_written_is_one_line_and_nothing_is_left(
    tmp_path: Path, out: str
) -> None:
    resource = pytest.importorskip("resource")
    Run.create(tmp_path / "run", kind="test").finish(ce=0.5)
    target = tmp_path / "page.html"
    if out == "a file":
        (tmp_path / "file").write_text("")
        target = tmp_path / "file" / "page.html"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if out == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from rlo_core.cli.main import main; main()",
            "report",
            str(tmp_path / "run"),
            "--out",
            str(target),
        ],
        capture_output=True,
        text=True,
        preexec_fn=limited,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert not target.exists()
    assert not list(tmp_path.glob(".*.tmp"))
