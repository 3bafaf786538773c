"""`rlo-stylegan train` and patched scripts: the same training, recorded, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rlo_stylegan.checkout import find_checkout
from rlo_stylegan.cli import main
from rlo_stylegan.layers import carry_out, plan

pytestmark = pytest.mark.usefixtures("fresh_modules")
FAMILIES = ["ada", "stylegan3", "vision-aided"]


def forget() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("train", "training", "dnnlib", "torch_utils"):
            del sys.modules[name]
    from rlo_stylegan.factory import patched_class

    patched_class.cache_clear()


def by_script(root: Path, out: Path, *arguments: str) -> Path:
    """What `python train.py ...` does, in this process."""
    forget()
    out.mkdir(exist_ok=True)
    before, sys.argv = sys.argv, [str(root / "train.py"), "--outdir", str(out), *arguments]
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    try:
        runpy.run_path(str(root / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.dont_write_bytecode = before, kept
        sys.path.remove(str(root))
    return max(out.iterdir())


def by_launcher(root: Path, out: Path, *arguments: str) -> Path:
    forget()
    out.mkdir(exist_ok=True)
    command = ["train", str(root / "train.py"), "--outdir", str(out), *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return max(out.iterdir())


def weights(run: Path) -> Any:
    with (run / "network-snapshot-000008.pkl").open("rb") as file:
        return pickle.load(file)


def options(run: Path) -> dict[str, Any]:
    return json.loads((run / "training_options.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_ce_trains_as_the_original_does_to_the_last_bit(build, tmp_path: Path, family: str) -> None:
    root, out = build(family), tmp_path / "runs"
    original = by_script(root, out)
    launched = by_launcher(root, out)
    carry_out(plan(find_checkout(root), ["loss"]))
    patched = by_script(root, out)
    also = by_script(root, out, "--loss", "ce")
    for run in (launched, patched, also):
        assert weights(run) == weights(original)
        assert (run / "stats.jsonl").read_text() == (original / "stats.jsonl").read_text()
        assert options(run)["loss_kwargs"]["gan_loss"] == "ce"


@pytest.mark.parametrize("family", FAMILIES)
def test_rlo_trains_alike_patched_and_launched_and_is_recorded(
    build, snapshot, tmp_path: Path, family: str
) -> None:
    root, out = build(family), tmp_path / "runs"
    before = snapshot(root)
    launched = by_launcher(root, out, "--loss", "rlo", "--kparam", "4")
    assert snapshot(root) == before  # no __pycache__ either
    carry_out(plan(find_checkout(root), ["loss"]))
    patched = by_script(root, out, "--loss=rlo", "--kparam=4")
    ce = by_script(root, out)
    assert weights(launched) == weights(patched) != weights(ce)
    assert options(patched)["loss_kwargs"]["gan_loss"] == "rlo-convex:k=4"
    assert options(launched)["loss_kwargs"] == options(patched)["loss_kwargs"] | {
        "class_name": "rlo_stylegan.factory.patched_loss",
        "base_class": "training.loss.TinyLoss",
    }
    last = json.loads((patched / "stats.jsonl").read_text().splitlines()[-1])
    assert {"Loss/ce/G", "Loss/ce/D_fake", "Loss/ce/D_real", "Loss/slope/G"} <= set(last)
    record = json.loads((launched / "run.json").read_text())
    assert (record["kind"], record["loss"], record["status"]) == (
        "stylegan train",
        "rlo-convex:k=4",
        "done",
    )
    ticks = [json.loads(line) for line in (launched / "metrics.jsonl").read_text().splitlines()]
    assert [tick["kimg"] for tick in ticks] == [8, 16, 24, 32, 40]
    assert {"loss_G", "ce_G", "slope_G", "loss_D", "ce_D", "score_real"} <= set(ticks[0])


def test_the_authors_nan_does_not_happen(build, tmp_path: Path) -> None:
    """Logits a thousand times too big: the released form would be inf at the first step."""
    root, out = build("stylegan3"), tmp_path / "runs"
    run = by_launcher(root, out, "--loss", "rlo", "--scale", "1000", "--steps", "20")
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert min(line["Loss/scores/fake"]["mean"] for line in lines) < -90
    for line in lines:
        assert all(abs(value["mean"]) < float("inf") for value in line.values())


def test_a_snapshot_of_a_patched_run_loads_without_our_package(build, tmp_path: Path) -> None:
    run = by_launcher(build("ada"), tmp_path / "runs", "--loss", "rlo")
    code = (
        "import sys, pickle\n"
        "sys.modules['rlo_stylegan'] = sys.modules['rlo_core'] = None\n"
        f"print(sorted(pickle.load(open({str(run / 'network-snapshot-000008.pkl')!r}, 'rb'))))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "['module', 'weights']\n"


@pytest.mark.parametrize("how", ["launched", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mistake_in_the_flags_is_one_line_and_no_run(
    build, tmp_path: Path, capfd, family: str, how: str
) -> None:
    root, out = build(family), tmp_path / "runs"
    out.mkdir()
    arguments = ["--outdir", str(out), "--loss", "ce", "--kparam", "2"]
    if how == "launched":
        forget()
        result = CliRunner().invoke(main, ["train", str(root / "train.py"), *arguments])
        assert result.exit_code == 2
        said = result.stderr
    else:
        carry_out(plan(find_checkout(root), ["loss"]))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            by_script(root, out, *arguments[2:])
        assert end.value.code == 2
        said = capfd.readouterr().err
    assert said.splitlines()[-1] == "Error: loss 'ce' takes no option 'k'; it takes none"
    assert list(out.iterdir()) == []


def test_the_scripts_own_help_lists_the_options(build) -> None:
    forget()
    script = str(build("ada") / "train.py")
    output = CliRunner().invoke(main, ["train", script, "--help"]).output
    assert "--gamma" in output
    assert "--loss SPEC" in output
    assert "[default: ce]" in output
    assert "--kparam FLOAT" in output


def test_train_refuses_before_it_imports_anything(build) -> None:
    root = build("ada")
    loss = root / "training" / "loss.py"
    loss.write_text(loss.read_text().replace("softplus(-real_logits)", "relu(-real_logits)"))
    (root / "train.py").write_text("raise SystemError\n" + (root / "train.py").read_text())
    result = CliRunner().invoke(main, ["train", str(root / "train.py")])
    assert result.exit_code == 1
    assert "is not understood: looked in accumulate_gradients for three terms" in result.output
    result = CliRunner().invoke(main, ["train", str(loss)])
    assert result.output == (
        f"Error: script must be the train.py of a checkout, got {str(loss)!r}\n"
    )


def test_a_patched_checkout_needs_no_launcher_and_is_told_so(build) -> None:
    root = build("ada")
    carry_out(plan(find_checkout(root), ["loss"]))
    result = CliRunner().invoke(main, ["train", str(root / "train.py")])
    assert result.exit_code == 1
    assert "is patched already: run `python " in result.output


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ada", "stylegan3"])
def test_spawned_processes_train_with_the_same_loss(build, tmp_path: Path, family: str) -> None:
    root, out = build(family), tmp_path / "runs"
    out.mkdir()
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ["--outdir", str(out), "--gpus", "2", "--steps", "3", "--loss", "rlo"]
    for command in (
        [sys.executable, "-m", "rlo_stylegan", "train", str(root / "train.py")],
        [sys.executable, str(root / "train.py")],
    ):
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
        carry_out(plan(find_checkout(root), ["loss"]))
    launched, patched = sorted(out.iterdir())
    assert weights(launched) == weights(patched)
    assert options(launched)["loss_kwargs"]["gan_loss"] == "rlo-convex:k=2"
