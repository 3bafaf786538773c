"""The figures of the page on trust are those of the files of results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "trust_figures.py"


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, f"run scripts/trust_figures.py --write\n{done.stderr}"
