"""The script that stops writers at random moments finds nothing broken, and can find it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "torture.py"

BREAK = """
import sys
sys.path.insert(0, {folder!r})
import torture
import rlo_core.runs.record as record
from pathlib import Path
torture.write_json = lambda path, document: Path(path).write_text(torture.json.dumps(document))
sys.argv = ["torture", "--minutes", "0.3", "--seed", "3", "--out", {out!r}]
torture.main()
"""


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_trial_holds_for_a_short_while(tmp_path: Path) -> None:
    out = tmp_path / "torture.jsonl"
    command = [sys.executable, str(SCRIPT), "--minutes", "0.3", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *records = lines(out)
    assert header["benchmark"] == "torture"
    assert len(records) == 6
    for record in records:
        assert record["held"] == record["tried"]
        assert int(str(record["tried"])) >= 1


@pytest.mark.slow
def test_a_writer_that_is_not_atomic_is_found(tmp_path: Path) -> None:
    out = tmp_path / "torture.jsonl"
    code = BREAK.format(folder=str(SCRIPT.parent), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(record.get("failures") for record in lines(out)[1:])
