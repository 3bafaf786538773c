"""What a run leaves on disk, and how files are written."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest
import torch
from rlo_core.errors import RunError
from rlo_core.files import atomic_path, write_json, write_text
from rlo_core.runs.record import Run, machine, read_metrics, read_run, versions


def test_run_json_has_what_was_decided_and_metrics_what_was_measured(tmp_path: Path) -> None:
    run = Run.create(
        tmp_path / "r",
        kind="test",
        loss="rlo:k=8",
        options={"lr": 0.1},
        seed=3,
        data={"name": "digits"},
    )
    assert read_run(run.folder)["status"] == "running"
    run.log(epoch=0, ce=torch.tensor(0.5), split="val")
    run.log(epoch=1, ce=math.nan)
    run.finish(accuracy=torch.tensor(0.9), best=math.inf)
    document = read_run(run.folder)
    assert document["loss"] == "rlo:k=8"
    assert document["options"] == {"lr": 0.1}
    assert (document["seed"], document["data"], document["status"]) == (
        3,
        {"name": "digits"},
        "done",
    )
    assert document["versions"]["torch"] == versions()["torch"]
    assert document["machine"]["cores"] == machine()["cores"]
    assert document["summary"] == {"accuracy": pytest.approx(0.9), "best": "inf"}
    assert list(read_metrics(run.folder)) == [
        {"epoch": 0, "ce": 0.5, "split": "val"},
        {"epoch": 1, "ce": "nan"},
    ]
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_new_run_starts_empty_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    for resume, count in ((False, 1), (True, 2), (False, 1)):
        Run.create(tmp_path, kind="test", resume=resume).log(epoch=0)
        assert len(list(read_metrics(tmp_path))) == count


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    Run.create(tmp_path, kind="test").log(epoch=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1, "ce"')
    assert list(read_metrics(tmp_path)) == [{"epoch": 0}]
    path.write_text('{"epoch"\n{"epoch": 1}\n')
    with pytest.raises(RunError, match=r"line 1, is not JSON"):
        list(read_metrics(tmp_path))


def test_a_folder_without_a_run_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        read_run(tmp_path)
    assert str(caught.value) == f"no run in {str(tmp_path)!r}: run.json is not there"
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RunError, match=r"must hold an object, got list$"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"is not JSON"):
        read_run(tmp_path)
    assert list(read_metrics(tmp_path)) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_file_gets_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    (tmp_path / "b").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b")]
    assert modes[0] == modes[1]
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'
