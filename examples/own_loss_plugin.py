"""A loss of your own as a plug-in: every command of the suite then takes it by name.

    python examples/own_loss_plugin.py

A real package would be installed with pip. Here its two files, the module and the metadata that
`pyproject.toml` turns into, are written to a folder that Python is shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODULE = '''
import rlo_core


class Sqrt(rlo_core.Link):
    """sqrt(1 + a ce) - 1, scaled to slope 1 at 0: between cross entropy and the bounded loss."""

    def __init__(self, a):
        self.a = a

    def value(self, ce):
        return (2 / self.a) * ((1 + self.a * ce).sqrt() - 1)

    def slope(self, ce):
        return (1 + self.a * ce).rsqrt()


def sqrt_loss(
    *, a: float = 2.0, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    return rlo_core.LinkLoss(
        Sqrt(a),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
'''
# What pip writes for a pyproject.toml with
#     [project.entry-points."rlo_core.losses"]
#     sqrt = "sqrt_loss:sqrt_loss"
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: sqrt-loss\nVersion: 1.0\n",
    "entry_points.txt": "[rlo_core.losses]\nsqrt = sqrt_loss:sqrt_loss\n",
}
USE = """
import torch
from rlo_core import create_loss

criterion = create_loss("sqrt:a=4", label_smoothing=0.1)
logits = torch.zeros(2, 3, requires_grad=True)
loss = criterion(logits, torch.tensor([0, 2]))
loss.backward()
print("create_loss('sqrt:a=4') gives", round(loss.item(), 4))
"""


def main() -> None:
    """Write the package, list the losses, use it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sqrt_loss.py").write_text(MODULE)
        metadata = Path(folder) / "sqrt_loss-1.0.dist-info"
        metadata.mkdir()
        for name, text in METADATA.items():
            (metadata / name).write_text(text)
        environment = {**os.environ, "PYTHONPATH": folder}
        rlo = str(Path(sys.executable).parent / "rlo")
        listed = subprocess.run(
            [rlo, "losses"], env=environment, check=True, capture_output=True, text=True
        ).stdout
        print(next(line for line in listed.splitlines() if line.startswith("sqrt")))
        sys.stdout.flush()
        subprocess.run([sys.executable, "-c", USE], env=environment, check=True)


if __name__ == "__main__":
    main()
