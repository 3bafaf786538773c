"""What `pip install rlo-timm` will do, tried with wheels in place of an index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_five_wheels_install_by_name_and_every_entry_point_of_them_loads(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/dist.py"], cwd=root, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for package in ("core", "timm", "hf", "gptq", "stylegan"):
        assert f"rlo-{package} " in done.stdout
