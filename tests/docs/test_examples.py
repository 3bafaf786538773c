"""The examples run offline, as their first lines say, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_tested_and_listed() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    here = Path(__file__).read_text()
    assert all(f'run("{name}"' in here for name in listed)


def test_a_loss_of_ones_own_is_listed_and_used_by_its_name(tmp_path: Path) -> None:
    shown = run("own_loss_plugin.py", tmp_path)
    assert re.search(r"^sqrt +sqrt-loss 1\.0", shown, re.MULTILINE)
    assert "create_loss('sqrt:a=4') gives 0.66" in shown


def test_the_table_has_accuracies_near_those_of_logistic_regression(tmp_path: Path) -> None:
    accuracies = numbers(run("table_with_scikit_learn.py", tmp_path), r"accuracy (\S+)")
    assert len(accuracies) == 3
    assert min(accuracies) > max(accuracies) - 0.03


@pytest.mark.slow
def test_with_wrong_labels_the_bounded_loss_is_more_accurate_than_cross_entropy(
    tmp_path: Path,
) -> None:
    ce, rlo = numbers(run("noisy_labels.py", tmp_path), r"labels (\S+)%, confidence")
    assert rlo > ce + 2


@pytest.mark.slow
def test_the_trainer_reports_perplexity_beside_the_objective(tmp_path: Path) -> None:
    assert len(numbers(run("trainer.py", tmp_path), r"true perplexity per byte (\S+)")) == 2


@pytest.mark.slow
def test_a_model_in_two_bits_writes_and_is_smaller(tmp_path: Path) -> None:
    shown = run("quantize_and_generate.py", tmp_path)
    assert "2 bits writes: 'def " in shown
    dense, packed = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", shown))
    assert packed < dense / 4
