"""The real train.py of a timm clone: `pytest tests/timm -m upstream --timm-checkout DIR`.

DIR is a git clone of timm (its tags are taken with `git archive`), or one unpacked release. Every
release tag of the clone from v0.9.16 on is run, and HEAD; `--timm-tags A,B` runs these only. What
was seen goes into `benchmarks/results/timm_upstream.jsonl` and, drawn from it, the guide's table.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream_table as table
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = pytest.mark.upstream
HERE = Path(__file__).resolve().parent

# These need CUDA to train: they are taken as far as their own --help and a bad spec.
PARSED = ["v0.2.1", "v0.4.12", "v0.5.4", "v0.6.13", "v0.8.17dev0"]
FIRST_TRAINED = (0, 9, 16)


def trained(config: pytest.Config) -> list[str]:
    """Return the release tags that train on a CPU, and HEAD."""
    if chosen := config.getoption("--timm-tags"):
        return str(chosen).split(",")
    folder = config.getoption("--timm-checkout")
    if folder is None:
        return ["HEAD"]
    git = ["git", "-C", str(folder), "tag"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    found = [tag for tag in done.stdout.split() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    numbers = {tag: tuple(map(int, tag[1:].split("."))) for tag in found}
    return [*sorted((t for t in found if numbers[t] >= FIRST_TRAINED), key=numbers.get), "HEAD"]  # type: ignore[arg-type]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tags = {
        "test_help_and_a_bad_spec": lambda: [*PARSED, *trained(metafunc.config)],
        "test_every_loss_path": lambda: trained(metafunc.config),
    }.get(metafunc.function.__name__)
    if tags is not None:
        metafunc.parametrize("tag", tags())


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


def version_of(checkout: Path) -> str:
    """Return what main calls itself, `main (1.0.29.dev0)`."""
    found = re.search(r"'(.+)'", (checkout / "timm" / "version.py").read_text())
    return f"main ({found.group(1)})" if found else "main"


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


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


def test_every_loss_path(checkout: Path, digits: Path, tmp_path: Path, tag: str) -> None:
    done = python(str(HERE / "drive.py"), str(checkout), str(digits), str(tmp_path), cwd=checkout)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
    records = [json.loads(line) for line in lines]
    print(tag, *lines, sep="\n")
    assert done.returncode == 0, done.stderr[-2000:]
    name = {"HEAD": version_of(checkout)}.get(tag, tag)
    table.write(table.row_of(name, records, {"torch": torch.__version__.split("+")[0]}))
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
