"""The demo: its parts come from entry points, and digits are learned."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rlo_core.demo.digits import CLEAN_TABLE, NOISY_TABLE, load_digits, wrong_labels
from rlo_core.demo.digits import demo as digits
from rlo_core.demo.parts import demo_parts, run_demo
from rlo_core.errors import PluginError, SpecError
from rlo_core.runs.record import read_metrics, read_run

PART = """
from rlo_core.errors import RLOError
from rlo_core.runs.record import Run

def part(run_dir, *, console):
    run = Run.create(run_dir, kind="demo small", loss="ce", seed=0)
    for epoch in range(3):
        run.log(epoch=epoch, split="val", accuracy=0.1 * epoch)
    console.print("small is done")
    summary = {"accuracy": 0.2, "small": [{"loss": "ce", "accuracy": 0.2}]}
    run.finish(**summary)
    return summary

def absent(run_dir, *, console):
    raise RLOError("no model here")
"""


def test_digits_are_real_and_split_the_same_each_time() -> None:
    train_x, train_y, test_x, test_y = load_digits()
    assert (len(train_x), len(test_x)) == (1437, 360)
    assert train_x.shape[1:] == (1, 8, 8)
    assert float(train_x.max()) == 1.0
    assert test_y.bincount().min() >= 34
    assert bool((load_digits()[0] == train_x).all())
    assert train_y.dtype == test_y.dtype


def test_the_wrong_labels_are_a_share_of_other_digits_and_always_the_same() -> None:
    labels = load_digits()[1]
    noisy = wrong_labels(labels)
    assert 0.35 < float((noisy != labels).double().mean()) < 0.45
    assert 0 <= int(noisy.min()) <= int(noisy.max()) <= 9
    assert bool((wrong_labels(labels) == noisy).all())
    assert bool((wrong_labels(labels, 1.0) != labels).all())


@pytest.mark.slow
def test_with_wrong_labels_the_bounded_loss_is_ahead_and_learns_fewer_of_them(
    tmp_path: Path,
) -> None:
    console = Console(file=io.StringIO(), width=100)
    summary = digits(tmp_path, console=console, losses=("ce",), seeds=(0,))
    rows = {row["loss"]: row for row in summary[NOISY_TABLE]}
    assert rows["rlo:k=2"]["accuracy %"] > rows["ce"]["accuracy %"]
    assert rows["rlo:k=2"]["wrong labels learnt %"] < rows["ce"]["wrong labels learnt %"]


def test_two_epochs_on_digits_beat_chance_and_are_on_disk(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    summary = digits(
        tmp_path / "r",
        console=console,
        losses=("ce", "rlo"),
        noisy_losses=("ce", "rlo:k=2"),
        seeds=(0,),
        epochs=2,
    )
    rows = summary[CLEAN_TABLE]
    assert [(row["network"], row["loss"]) for row in rows] == [
        ("conv", "ce"),
        ("conv", "rlo"),
        ("vit", "ce"),
        ("vit", "rlo"),
    ]
    assert all(row["accuracy %"] > 40 for row in rows if row["network"] == "conv")
    assert rows[0]["time of a step / ce"] == 1.0
    records = list(read_metrics(tmp_path / "r"))
    assert len(records) == 16
    assert [row["loss"] for row in summary[NOISY_TABLE]] == ["ce", "rlo:k=2"]
    assert set(summary["notes"]) == {CLEAN_TABLE, NOISY_TABLE}
    assert "points from ce" in summary["notes"][NOISY_TABLE]
    assert {"net", "loss", "seed", "epoch", "accuracy", "calibration error"} <= set(records[0])
    assert "calibration" in stream.getvalue()


@pytest.fixture
def parts(install: Callable[..., None]) -> None:
    install(
        "small-demo",
        "1.0",
        {"plugin_demo": PART},
        {
            "rlo_core.demos": {
                "small": "plugin_demo:part",
                "absent": "plugin_demo:absent",
                "broken": "plugin_demo:nothing",
            }
        },
    )


@pytest.mark.usefixtures("parts")
def test_parts_of_other_packages_join_and_ours_comes_first(tmp_path: Path) -> None:
    assert next(iter(demo_parts())) == "digits"
    assert {"small", "absent", "broken"} <= set(demo_parts())
    console = Console(file=io.StringIO())
    summaries = run_demo(tmp_path / "demo", parts=["small", "absent"], console=console)
    assert summaries["small"]["accuracy"] == 0.2
    assert summaries["absent"] == {"skipped": "no model here"}
    document = read_run(tmp_path / "demo")
    assert document["status"] == "done"
    assert document["summary"]["small: accuracy"] == 0.2
    assert document["summary"]["small"] == [{"loss": "ce", "accuracy": 0.2}]
    assert [record["part"] for record in read_metrics(tmp_path / "demo")] == ["small"] * 3
    assert (tmp_path / "demo" / "small" / "run.json").exists()
    assert "small, val: accuracy" in (tmp_path / "demo" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "demo").glob("*.png")] == ["small-val-accuracy.png"]
    json.dumps(summaries)


@pytest.mark.usefixtures("parts")
def test_an_unknown_and_a_broken_part_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^unknown demo part 'none'; available: digits, "):
        run_demo(tmp_path, parts=["none"])
    with pytest.raises(
        PluginError,
        match=r"^demo part 'broken' from small-demo 1.0 failed to import \(AttributeError",
    ):
        run_demo(tmp_path, parts=["broken"])
