"""What is written from the links is current, and a new loss needs its link only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

LINK = '''

@dataclass(frozen=True)
class Halved(Link):
    r"""Halved cross entropy :math:`ce/d`, slope :math:`1/d`.

    Args:
        d: Divisor, > 0.

    Source: a test.
    """

    spec = "halved"
    function = "halved_loss"
    criterion = "HalvedLoss"
    formula = "ce / d"
    d: float = 2.0

    def value(self, ce: Tensor) -> Tensor:
        return ce / self.d

    def slope(self, ce: Tensor) -> Tensor:
        return torch.ones_like(ce) / self.d


BUILT_IN: dict[str, type[Link]] = {"halved": Halved}
'''

USE = """
import torch, rlo_core
from rlo_core.linear.link_codes import decode, encode
logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
expected = torch.nn.functional.cross_entropy(logits, target) / 4
torch.testing.assert_close(rlo_core.halved_loss(logits, target, d=4.0), expected)
torch.testing.assert_close(rlo_core.HalvedLoss(4.0)(logits, target), expected)
assert decode(*encode(rlo_core.links.Halved(4.0))) == rlo_core.links.Halved(4.0)
"""


def test_functions_criteria_and_exports_are_what_the_links_say(root: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "write_losses.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_link_becomes_a_function_a_criterion_and_a_spec_name(root: Path, tmp_path: Path):
    package = tmp_path / "packages" / "rlo-core"
    shutil.copytree(root / "packages" / "rlo-core", package, ignore=shutil.ignore_patterns("__py*"))
    shutil.copytree(root / "scripts", tmp_path / "scripts")
    shutil.copy(root / "pyproject.toml", tmp_path)
    links = package / "src" / "rlo_core" / "links.py"
    text = links.read_text()
    links.write_text(text[: text.index("\n\nBUILT_IN:")] + LINK)
    environment = {**os.environ, "PYTHONPATH": str(package / "src")}
    run = {"capture_output": True, "text": True, "check": False, "env": environment}
    done = subprocess.run([sys.executable, str(tmp_path / "scripts" / "write_losses.py")], **run)
    assert done.returncode == 0, done.stderr
    assert 'halved = "rlo_core.modules:HalvedLoss"' in (package / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "-c", USE], **run)
    assert done.returncode == 0, done.stderr
