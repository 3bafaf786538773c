"""The CUDA row kernel under Triton's interpreter, against the rows that the CPU computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, torch
from rlo_core.linear import triton_kernels
from rlo_core.linear.tile import rows_loss
from rlo_core.links import CE

triton_kernels.BLOCK = 64
torch.manual_seed(0)
worst = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    errors = []
    for columns in (1, 7, 64, 201):
        for cap in (None, 5.0):
            for size in (1.0, 30.0):
                wide = torch.randn(6, columns + 3) * size
                tile = wide[:, :columns].to(dtype)
                target = torch.randint(columns, (6,))
                target[2] = -100
                ours, other = tile.clone(), tile.clone()
                ce = triton_kernels.cross_entropy_rows(
                    ours, target, ignore_index=-100, softcap=cap, with_gradient=True)
                kept = target != -100
                expected, _ = rows_loss(
                    other, target.clamp(min=0), CE(), softcap=cap, with_gradient=True)
                assert (ours[~kept] == 0).all() and (ce[~kept] == 0).all()
                errors.append((ce - expected)[kept].abs().max().item() / size)
                gap = (ours.float() - other.float())[kept].abs().max().item()
                errors.append(gap / (1 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps))
    worst[str(dtype)] = max(errors)
print(json.dumps(worst))
"""


def test_the_kernel_agrees_with_the_rows_of_the_cpu():
    """In half precision to a few units of the last place: the interpreter truncates bfloat16."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert worst["torch.float32"] < 1e-6
    assert worst["torch.bfloat16"] < 1.0
    assert worst["torch.float16"] < 1.0
