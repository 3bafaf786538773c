"""The real train.py of a timm clone: `pytest tests/timm -m upstream --timm-checkout DIR`.

DIR is a git clone of timm (its tags are taken with `git archive`), or one unpacked release.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = pytest.mark.upstream
HERE = Path(__file__).resolve().parent

# These need CUDA to train: they are taken as far as their own --help and a bad spec.
PARSED = ["v0.2.1", "v0.4.12", "v0.5.4", "v0.6.13", "v0.8.17dev0"]
TRAINED = ["v0.9.16", "v1.0.3", "v1.0.15", "v1.0.22", "v1.0.23", "v1.0.28", "HEAD"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as 32x32 image folders."""
    root = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    for split, start, stop in (("train", 0, 24), ("validation", 24, 40)):
        for label in range(10):
            (root / split / str(label)).mkdir(parents=True)
        for i in range(start, stop):
            picture = Image.fromarray((bunch.images[i] * 15.9).astype(np.uint8)).resize((32, 32))
            picture.convert("RGB").save(root / split / str(bunch.target[i]) / f"{i}.png")
    return root


@pytest.fixture
def checkout(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tag: str
) -> Path:
    """The tree of a tag."""
    option = request.config.getoption("--timm-checkout")
    if option is None:
        pytest.skip("no --timm-checkout DIR")
    folder = Path(option).resolve()
    git = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--verify", "-q", f"{tag}^{{commit}}"],
        capture_output=True,
        check=False,
    )
    if git.returncode:
        if tag != "HEAD":
            pytest.skip(f"no tag {tag} in {folder}")
        return folder
    target: Path = tmp_path_factory.mktemp("checkout") / tag
    target.mkdir()
    archive = ["git", "-C", str(folder), "archive", tag, "train.py", "timm"]
    packed = subprocess.run(archive, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(target)], input=packed, check=True)
    return target


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("tag", [*PARSED, *TRAINED])
def test_help_and_a_bad_spec(checkout: Path, tag: str) -> None:
    plain = python("train.py", "--help", cwd=checkout)
    if plain.returncode:
        pytest.skip(f"{tag} does not start on this torch: {plain.stderr.splitlines()[-1]}")
    ours = python("-m", "rlo_timm", "train.py", "--help", cwd=checkout)
    assert ours.returncode == 0, ours.stderr
    assert "Rooted logistic objectives (rlo-timm):\n  --loss SPEC" in ours.stdout
    bad = python("-m", "rlo_timm", "train.py", "x", "--loss", "rol", cwd=checkout)
    assert bad.returncode == 2
    assert "argument --loss: unknown loss 'rol'; did you mean 'rlo'?" in bad.stderr


@pytest.mark.parametrize("tag", ["v0.1.1"])
def test_the_release_before_is_refused(checkout: Path, tag: str) -> None:
    done = python("-m", "rlo_timm", "train.py", "x", "--loss", "rlo", cwd=checkout)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: train.py: not a train.py: looked for ")


@pytest.mark.parametrize("tag", TRAINED)
def test_every_loss_path(checkout: Path, digits: Path, tmp_path: Path, tag: str) -> None:
    done = python(str(HERE / "drive.py"), str(checkout), str(digits), str(tmp_path), cwd=checkout)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
    records = [json.loads(line) for line in lines]
    print(tag, *lines, sep="\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(records) >= 12
    wrong = [r for r in records if "error" in r or r.get("relative_error", 0.0) > 2e-5]
    assert not wrong, wrong
    assert all(r["steps"] > 0 for r in records if "steps" in r)
    assert records[-2]["saved"] == "rlo:k=8,m=10"
    assert records[-1] == {
        "run": "bit-identical without --loss",
        "identical": True,
        "same_args": True,
    }


@pytest.mark.parametrize("tag", ["v0.9.16", "HEAD"])
def test_the_hook_is_the_same_run(checkout: Path, digits: Path, tmp_path: Path, tag: str) -> None:
    (tmp_path / "rlo.yaml").write_text("loss: rlo:k=8,m=10\n")
    argv = (
        f"--data-dir {digits} --model resnet18 --num-classes 10 --input-size 3 32 32 -b 8 "
        f"--epochs 1 --warmup-epochs 0 --device cpu --workers 1 --output {tmp_path}"
    ).split()
    hooked = ("train.py", "--device-modules", "rlo_timm.hook", "-c", str(tmp_path / "rlo.yaml"))
    launched = ("-m", "rlo_timm", "train.py", "--loss", "rlo:k=8,m=10")
    results = []
    for name, command in (("hooked", hooked), ("launched", launched)):
        done = python(*command, *argv, "--experiment", name, cwd=checkout)
        assert done.returncode == 0, done.stderr[-2000:]
        summary = (tmp_path / name / "summary.csv").read_text().splitlines()
        results.append([row.split(",")[:3] for row in summary])
    assert results[0] == results[1]
