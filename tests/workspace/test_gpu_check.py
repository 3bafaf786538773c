"""The check for a GPU machine: its stages run, and together keep its promise of nine minutes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def measure():
    spec = importlib.util.spec_from_file_location("gpu_measure", SCRIPTS / "gpu_measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stage", ["machine", "linear", "losses", "quantize", "packed", "trellis"])
def test_a_stage_writes_lines_that_the_table_reads(stage, tmp_path, capsys):
    module, file = measure(), tmp_path / "out.jsonl"
    module.STAGES[stage](module.Lines(file, stage), module.Machine("cpu", quick=True))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records
    assert all(record["stage"] == stage for record in records)
    capsys.readouterr()
    module.table(file)
    assert len(capsys.readouterr().out.splitlines()) == len(records)


def test_the_script_parses_and_its_limits_stay_under_nine_minutes():
    script = SCRIPTS / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    limits = [int(x) for x in re.findall(r"^stage \w+ (\d+)", text, re.MULTILINE)]
    limits += [int(x) for x in re.findall(r"--kill-after=10 (\d+) bash", text)]
    assert len(limits) == 8
    assert sum(limits) <= 540
    stages = re.findall(r"^stage (\w+)", text, re.MULTILINE)
    assert set(stages) == set(measure().STAGES)
