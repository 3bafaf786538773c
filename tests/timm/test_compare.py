"""Images in a comparison: a run is the trainer's, and the command finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rlo_core.cli.main import main
from rlo_core.errors import RLOError
from rlo_timm.compare import TimmTask
from rlo_timm.trainer.evaluate import evaluate
from rlo_timm.trainer.fit import train
from rlo_timm.trainer.settings import TrainSettings

SMALL = {
    "dataset": "digits", "net": "test_resnet", "epochs": 1, "batch_size": 32, "train_limit": 128,
    "val_limit": 60, "workers": 0, "device": "cpu",
}  # fmt: skip


def test_a_run_is_measured_like_rlo_timm_eval_measures_the_trainers_run(tmp_path: Path) -> None:
    task = TimmTask(TrainSettings(**SMALL), rates=(0.001, 0.01))
    found = task.run("rlo:k=2", 0.01, 3)
    settings = TrainSettings(**SMALL, loss="rlo:k=2", lr=0.01, seed=3, logger="none")
    train(settings, out=tmp_path / "run")
    expected = evaluate(tmp_path / "run", "digits", limit=60)
    assert found["samples"] == expected.images == 60
    assert found["accuracy"] == pytest.approx(expected.acc1)
    assert found["ce"] == pytest.approx(expected.ce, rel=1e-5)
    assert found["ece"] == pytest.approx(expected.ece, abs=1e-5)


def test_rates_lie_around_the_networks_own_and_losses_are_checked_before_training() -> None:
    task = TimmTask(TrainSettings(**SMALL, lr=0.01))
    assert task.rates == pytest.approx((0.001, 0.003, 0.01, 0.03))
    assert task.rates[task.default] == 0.01
    with pytest.raises(RLOError, match=r"unknown loss 'rol'; did you mean 'rlo'"):
        task.check("rol")


def test_the_command_takes_the_trainers_options_and_not_those_that_it_decides() -> None:
    shown = CliRunner().invoke(main, ["compare", "timm", "--help"]).stdout
    for option in ("--dataset", "--net", "--epochs", "--trials", "--minutes", "--rate", "--apply"):
        assert option in shown
    for option in ("--resume", "--push", "--loss-schedule", "--seed "):
        assert option not in shown


@pytest.mark.slow
def test_a_comparison_of_images_and_auto_end_in_a_trained_network(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    out = tmp_path / "cmp"
    result = CliRunner().invoke(
        main,
        ["compare", "timm", *options, "--loss", "rlo", "--k", "2", "--rate", "0.001,0.01",
         "--seeds", "2", "--trials", "6", "--out", str(out), "--apply", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    verdict = json.loads(result.stdout)
    assert verdict["rate_name"] == "lr"
    assert (out / "winner" / "model.safetensors").is_file()
    run = tmp_path / "auto"
    result = CliRunner().invoke(
        main, ["timm", "train", *options, "--loss", "auto", "--logger", "none", "--out", str(run)]
    )
    assert result.exit_code == 0, result.output
    verdict = json.loads((tmp_path / "auto-compare" / "verdict.json").read_text())
    assert json.loads((run / "run.json").read_text())["loss"] == verdict["choice"]
    assert verdict["runs"] <= 14
