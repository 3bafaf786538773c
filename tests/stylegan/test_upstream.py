"""On a real checkout, named with `--stylegan-checkout DIR`: a copy of it is patched and trained.

The networks are tiny, the images are 32x32, and the CUDA device that the training loop asks for is
a CPU (`cpu_run.py`, in the tests only). Run it once for each checkout:

    pytest -m upstream tests/stylegan --stylegan-checkout ~/stylegan2-ada-pytorch
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rlo_stylegan.checkout import SCRIPT, find_checkout
from rlo_stylegan.cli import main
from rlo_stylegan.script import read_script

pytestmark = pytest.mark.upstream
HERE = Path(__file__).parent
LOADER = """
import io, json, pickle, sys, warnings
import importlib.abc

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('rlo_stylegan', 'rlo_core'):
            raise ImportError(name)

warnings.simplefilter('ignore')
sys.meta_path.insert(0, Without())
sys.path.insert(0, sys.argv[1])
import hashlib
with open(sys.argv[2], 'rb') as file:
    data = pickle.load(file)
digest = hashlib.sha256()
for net in ('G', 'D', 'G_ema'):
    for name, tensor in sorted(data[net].state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
print('DIGEST', digest.hexdigest())
"""


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """64 images as files: CIFAR-10 where there is a copy, else noise."""
    folder = tmp_path_factory.mktemp("images")
    parquet = root.parent / "shared" / "data" / "cifar10" / "train-1.parquet"
    if parquet.is_file():
        import pyarrow.parquet as pq

        rows = pq.read_table(parquet).slice(0, 64).to_pylist()
        pictures = [Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB") for row in rows]
    else:
        draw = np.random.default_rng(0)
        pictures = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), "uint8")) for _ in range(64)]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"img{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def original(request: pytest.FixtureRequest) -> Path:
    named = request.config.getoption("--stylegan-checkout")
    if not named:
        pytest.skip("name a checkout with --stylegan-checkout DIR")
    return find_checkout(named).root


@pytest.fixture
def checkout(original: Path, tmp_path: Path) -> Path:
    """A copy without its repository and caches, with today's torch made to run it."""
    skip = shutil.ignore_patterns(".git", "__pycache__", ".rlo-stylegan")
    return Path(shutil.copytree(original, tmp_path / "checkout", ignore=skip))


@pytest.fixture(params=["stylegan2", "stylegan3-t"])
def arguments(request: pytest.FixtureRequest, original: Path) -> tuple[list[str], dict[str, Any]]:
    """Flags and overrides that make a run of a few steps, for the family of the checkout."""
    small = {"channel_base": 256, "channel_max": 16}
    overrides: dict[str, Any] = {
        "total_kimg": 0.016,
        "kimg_per_tick": 0.004,
        "image_snapshot_ticks": None,
        "network_snapshot_ticks": 100,
        "batch_size": 4,
        "batch_gpu": 4,
        "data_loader_kwargs": {"num_workers": 0, "prefetch_factor": None, "pin_memory": False},
        "G_kwargs": {"z_dim": 16, "w_dim": 16},
        "D_kwargs": small,
    }
    common = ["--metrics", "none", "--workers", "1"]
    if read_script((original / SCRIPT).read_bytes()).shape == "collected":
        overrides["G_kwargs"] |= small
        flags = ["--cfg", request.param, "--gpus", "1", "--batch", "4", "--gamma", "1"]
        return [*common, *flags], overrides
    if request.param != "stylegan2":
        pytest.skip("this family has one generator")
    overrides["G_kwargs"]["synthesis_kwargs"] = small
    return common, overrides


class Runner:
    """Trains a checkout in a process of its own; digests the last snapshot without our package."""

    def __init__(self, checkout: Path, images: Path, tmp_path: Path, arguments: Any) -> None:
        self.checkout, self.out = checkout, tmp_path / "runs"
        self.flags, overrides = arguments
        self.flags = ["--outdir", str(self.out), "--data", str(images), *self.flags]
        self.overrides = tmp_path / "overrides.json"
        self.overrides.write_text(json.dumps(overrides))
        self.environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def train(self, how: str, *more: str) -> Path:
        before = set(self.out.iterdir()) if self.out.is_dir() else set()
        self._python(HERE / "cpu_run.py", self.checkout, self.overrides, how, *self.flags, *more)
        (run,) = set(self.out.iterdir()) - before
        return run

    def digest(self, run: Path) -> str:
        """The weights of G, D and G_ema, loaded with rlo-stylegan out of reach."""
        (pickled,) = run.glob("*.pkl")
        loader = self.out.parent / "loader.py"
        loader.write_text(LOADER)
        return self._python(loader, self.checkout, pickled).split("DIGEST ")[1].strip()

    def _python(self, *command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            env=self.environment,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


def stats(run: Path) -> list[dict[str, float]]:
    return [
        {key: value["mean"] for key, value in json.loads(line).items() if key.startswith("Loss/")}
        for line in (run / "stats.jsonl").read_text().splitlines()
    ]


def test_apply_and_revert_give_every_byte_back(checkout: Path) -> None:
    before = content(checkout)
    invoke("apply", checkout, "--compat")
    assert content(checkout) != before
    invoke("revert", checkout)
    assert content(checkout) == before


def test_training_is_the_original_under_ce_and_trains_under_rlo(
    checkout: Path, images: Path, tmp_path: Path, arguments: Any
) -> None:
    untouched = content(checkout)
    invoke("doctor", checkout, "--compat")
    compatible = content(checkout)
    runner = Runner(checkout, images, tmp_path, arguments)
    plain = runner.train("script")
    launched = runner.train("launcher", "--loss", "rlo", "--kparam", "2")
    assert content(checkout) == compatible

    invoke("apply", checkout)
    ce = runner.train("script")
    rlo = runner.train("script", "--loss", "rlo", "--kparam", "2")
    resumed = runner.train("script", "--loss", "rlo", "--resume", str(next(rlo.glob("*.pkl"))))
    invoke("revert", checkout)
    assert content(checkout) == untouched

    invoke("doctor", checkout, "--compat")
    assert runner.digest(ce) == runner.digest(plain)
    assert stats(ce) == stats(plain)
    assert runner.digest(rlo) == runner.digest(launched)
    assert runner.digest(rlo) != runner.digest(plain)
    for run in (rlo, resumed):
        assert all(np.isfinite(value) for line in stats(run) for value in line.values())
        assert json.loads((run / "training_options.json").read_text())["loss_kwargs"][
            "gan_loss"
        ] == ("rlo-convex:k=2")
    first = stats(rlo)[0]
    # The first generator step of both runs sees the same logits, so its cross entropy is ce's loss.
    assert first["Loss/ce/G"] == pytest.approx(stats(plain)[0]["Loss/G/loss"], rel=1e-6)
    assert first["Loss/G/loss"] > first["Loss/ce/G"]
