"""The demo's part runs from training to the evaluation of the reloaded 2-bit model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rlo_core.runs.record import read_run
from rlo_gptq.demo import TABLE, run


@pytest.mark.slow
def test_the_demo_trains_quantizes_reloads_and_evaluates(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    summary = run(tmp_path, console=console, steps=40)
    names = [row["model"] for row in summary[TABLE]]
    assert names[0] == "float32"
    assert names[-1] == "2 bits, ldlqRG + incoherence"
    perplexities = {row["model"]: row["perplexity"] for row in summary[TABLE]}
    assert perplexities[names[-1]] < perplexities["2 bits, nearest"]
    assert summary["bytes_2bit"] < 0.3 * summary["bytes_float"]
    assert read_run(tmp_path)["summary"]["perplexity_2bit"] == summary["perplexity_2bit"]
    assert "ldlqRG + incoherence" in console.file.getvalue()
