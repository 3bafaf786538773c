"""One writer for each run folder of `rlo-timm train`, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from rlo_core.runs.folder import LOCK_FILE, lock_folder
from rlo_core.runs.record import read_metrics, read_run
from rlo_timm.cli import main

SMALL = ["--dataset", "digits", "--net", "test_resnet", "-b", "16", "--device", "cpu", "--json"]
SMALL += ["--workers", "0", "--lr", "1e-3", "--train-limit", "32", "--val-limit", "20"]
SMALL += ["--logger", "none"]

Train = Callable[..., Result]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["train", *argv])
        assert result.exit_code == code, result.output
        return result

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK_FILE}


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(
    train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(*SMALL, "--epochs", "1", "-o", str(out))
    before = contents(out)
    with lock_folder(out):
        for argv in (
            (*SMALL, "-o", str(out)),
            (*SMALL, "-o", str(out), "--overwrite"),
            ("--resume", str(out), "--epochs", "2"),
        ):
            refused = train(*argv, code=1).output
            assert refused.startswith(
                f"Error: {str(out)!r} is being written by process {os.getpid()} on "
            )
            assert refused.endswith("; wait for it to end, or choose another folder\n")
            assert refused.count("\n") == 1
        refused = train(
            "--resume", str(out), "--epochs", "2", "-o", str(tmp_path / "new"), code=1
        ).output
        assert f"{str(out)!r} is being written by process {os.getpid()} on " in refused
        assert not (tmp_path / "new").exists()
        train(*SMALL, "-o", str(out), "--fast-dev-run")  # writes nothing, waits for nobody
    assert contents(out) == before
    assert not (out / LOCK_FILE).exists()


@pytest.mark.slow
def test_the_folder_is_held_while_training_and_a_killed_run_leaves_no_lock(
    train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rlo_timm", "train", *SMALL, "--epochs", "100000"]
    first = subprocess.Popen(
        [*command, "--seed", "1", "-o", str(out)], stdout=subprocess.DEVNULL, text=True
    )
    try:
        while not (out / "checkpoints" / "best.ckpt").exists():
            assert first.poll() is None
        refused = train(*SMALL, "-o", str(out), "--overwrite", code=1).output
        assert f"is being written by process {first.pid} on " in refused
        assert "rlo_timm" in refused or "train" in refused
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    (out / "checkpoints" / ".last.ckpt.999999999.abcdefgh.tmp").write_bytes(b"cut off")
    refused = train(*SMALL, "-o", str(out), code=1).output
    assert "is there already; --overwrite replaces the run in it" in refused
    done = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] + 1
    train("--resume", str(out), "--epochs", str(done + 1), "--json")
    epochs = [record["epoch"] for record in read_metrics(out) if record["split"] == "val"]
    assert epochs == list(range(1, done + 2))
    assert not list(out.rglob("*.tmp"))
    assert not (out / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("trained", "given", "loss"),
    [
        ("rlo:k=8,m=10", ["--k", "3"], "rlo:k=3,m=10"),
        ("rlo:k=8,m=10", ["--m", "4"], "rlo:k=8,m=4"),
        ("rlo:k=8,m=10*entropy", ["--k", "3"], "rlo:k=3,m=10*entropy"),
        (
            "rlo:k=8,m=10,schedule=cosine,warmup=0.5",
            ["--k", "3"],
            "rlo:k=3,m=10,schedule=cosine,warmup=0.5",
        ),
        (
            "rlo:k=8,m=10,schedule=cosine,warmup=0.5",
            ["--loss-schedule", "linear"],
            "rlo:k=8,m=10,schedule=linear,warmup=1",
        ),
        ("rlo:k=8,m=10", ["--loss", "rlo:k=2"], "rlo:k=2"),
        ("rlo:k=8,m=10", ["--loss", "rlo", "--m", "2"], "rlo:m=2"),
        ("rlo:k=8,m=10", ["--config", "k3.yaml"], "rlo:k=3,m=10"),
        ("rlo:k=8,m=10", ["--config", "k3.yaml", "--k", "5"], "rlo:k=5,m=10"),
        ("ce", ["--loss", "focal"], "focal"),
        ("ce", [], "ce"),
    ],
)
def test_a_resumed_run_keeps_of_its_loss_what_is_not_given_anew(
    train: Train, tmp_path: Path, trained: str, given: list[str], loss: str
) -> None:
    out = tmp_path / "run"
    (tmp_path / "k3.yaml").write_text("k: 3\n")
    resolved = yaml.safe_load(train(*SMALL, "--loss", trained, "--print-config").output)
    (out / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 0}, out / "checkpoints" / "last.ckpt")
    (out / "run.json").write_text(json.dumps({"kind": "timm train", "options": resolved}))
    config = yaml.safe_load(train("--resume", str(out), *given, "--print-config").stdout)
    assert (config["loss"], config["k"], config["m"]) == (loss, None, None)


def test_a_run_that_cannot_be_resumed_is_left_as_it_was(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(*SMALL, "--epochs", "1", "-o", str(out))
    whole = {name: (out / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    checkpoint = out / "checkpoints" / "last.ckpt"
    for path, text, message in (
        (out / "metrics.jsonl", b'{"epoch": 1\nx\n', "metrics.jsonl', line 1, is not JSON"),
        (out / "run.json", b'{"kind": "timm train"}', "has no options, so nothing can go on"),
        (checkpoint, b"not a pickle", "is no checkpoint of a run: "),
    ):
        kept = path.read_bytes()
        path.write_bytes(text)
        before = contents(out)
        refused = train("--resume", str(out), "--epochs", "2", code=1).output
        assert message in refused
        assert refused.count("\n") == 1
        assert contents(out) == before
        path.write_bytes(kept)
    assert whole == {name: (out / name).read_bytes() for name in whole}
    assert read_run(out)["status"] == "done"
