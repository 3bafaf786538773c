"""Runs of a checkout as one page: ce beside rlo, comparable numbers, cut-off files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rlo_core.errors import RunError
from rlo_core.runs.record import read_metrics, read_run
from rlo_stylegan.cli import main
from rlo_stylegan.record import write_record
from rlo_stylegan.report import report_runs


def moment(mean: float) -> dict[str, float]:
    return {"num": 8, "mean": mean, "std": 0.5}


def make_run(folder: Path, loss: str | None, *, fids: list[float]) -> Path:
    folder.mkdir(parents=True)
    kwargs = {"class_name": "training.loss.TinyLoss"} | ({"gan_loss": loss} if loss else {})
    options = {
        "loss_kwargs": kwargs,
        "random_seed": 3,
        "training_set_kwargs": {"path": "cifar.zip", "resolution": 32, "max_size": 64},
    }
    (folder / "training_options.json").write_text(json.dumps(options))
    with (folder / "stats.jsonl").open("w") as log:
        for tick in range(3):
            line = {
                "Progress/kimg": moment(4.0 * tick),
                "Loss/G/loss": moment(0.9 - 0.1 * tick),
                "Loss/D/loss": moment(1.2),
                "Loss/scores/fake": moment(-0.5),
                "Timing/Greg": {"num": 0, "mean": float("nan"), "std": float("nan")},
                "timestamp": 1.0,
            }
            if loss not in (None, "ce"):
                line |= {"Loss/ce/G": moment(0.7), "Loss/slope/G": moment(1.5)}
                line |= {"Loss/ce/D_fake": moment(0.5), "Loss/ce/D_real": moment(0.25)}
            log.write(json.dumps(line) + "\n")
    with (folder / "metric-fid50k_full.jsonl").open("w") as log:
        for i, fid in enumerate(fids):
            snapshot = f"network-snapshot-{i * 4:06d}.pkl"
            line = {"results": {"fid50k_full": fid}, "snapshot_pkl": snapshot}
            log.write(json.dumps(line) + "\n")
    return folder


def test_an_unpatched_run_is_ce_and_its_cross_entropy_is_its_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-a", None, fids=[200.0, 90.0, 95.0])
    summary = write_record(run, tmp_path / "copy")
    assert summary["loss"] == "ce"
    assert summary["ce_G"] == summary["loss_G"] == pytest.approx(0.7)
    assert (summary["fid50k_full"], summary["best fid50k_full"]) == (95.0, 90.0)
    assert read_run(tmp_path / "copy")["seed"] == 3


def test_a_rooted_run_has_the_cross_entropy_that_it_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-a", "rlo-convex:k=2", fids=[])
    write_record(run, tmp_path / "copy")
    records = list(read_metrics(tmp_path / "copy"))
    assert [record["kimg"] for record in records] == [0.0, 4.0, 8.0]
    assert records[0]["ce_G"] == 0.7
    assert records[0]["ce_D"] == 0.75
    assert records[0]["slope_G"] == 1.5


def test_the_page_has_both_losses_and_the_fid_curve_and_the_runs_are_only_read(
    tmp_path: Path, snapshot
) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "00000-ce", "ce", fids=[200.0, 90.0])
    make_run(runs / "00001-rlo", "rlo-convex:k=2", fids=[190.0, 80.0])
    before = snapshot(runs)
    out = tmp_path / "page.html"
    result = CliRunner().invoke(
        main, ["report", str(runs), "--out", str(out), "--json", "--png", str(tmp_path / "png")]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [run["loss"] for run in document["runs"]] == ["ce", "rlo-convex:k=2"]
    assert [run["best fid50k_full"] for run in document["runs"]] == [90.0, 80.0]
    page = out.read_text()
    assert "fid50k_full" in page
    assert "rlo-convex:k=2" in page
    assert (tmp_path / "png" / "fid50k_full.png").is_file()
    assert snapshot(runs) == before


def test_a_last_line_that_was_cut_off_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-a", "ce", fids=[])
    with (run / "stats.jsonl").open("a") as log:
        log.write('{"Loss/G/')
    write_record(run, tmp_path / "copy")
    assert len(list(read_metrics(tmp_path / "copy"))) == 3
    (run / "stats.jsonl").write_text("{\n{}\n")
    with pytest.raises(RunError, match=r"stats\.jsonl', line 1, is not JSON"):
        write_record(run, tmp_path / "copy")


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        report_runs([tmp_path], tmp_path / "page.html")
    assert str(error.value) == (
        f"no GAN run in {str(tmp_path)!r}: training_options.json is neither there nor one "
        "folder below"
    )
