"""The command line as such: quick to ask for help, and reachable from `rlo`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from rlo_core.cli.main import main as rlo
from rlo_stylegan.cli import main


def test_help_imports_neither_torch_nor_libcst() -> None:
    code = (
        "import sys\nfrom rlo_stylegan.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'libcst', 'numpy'} & set(sys.modules)))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.endswith("LOADED []\n")
    assert "Commands:" in output.stdout


@pytest.mark.parametrize("name", ["apply", "revert", "status", "train", "doctor", "report"])
def test_every_command_is_reachable_from_rlo(name: str) -> None:
    result = CliRunner().invoke(rlo, ["stylegan", name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: rlo stylegan {name} ") or "Usage: " in result.output
    assert name in main.commands


def test_a_known_failure_is_one_line_and_usage_is_two() -> None:
    result = CliRunner().invoke(main, ["apply", "/no/such/folder"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: checkout must be a folder, got '/no/such/folder', which is not there\n"
    )
    assert CliRunner().invoke(main, ["revert", "--only", "colour", "x"]).exit_code == 2
