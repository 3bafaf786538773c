"""The CUDA kernels of a tile under Triton's interpreter, against torch's operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import itertools, json, torch
from rlo_core.linear import blocks, triton_kernels
from rlo_core.linear.settings import Settings
from rlo_core.links import CE, Poly1, Rooted, RootedConvex

triton_kernels.BLOCK = 64
torch.manual_seed(0)
# the interpreter truncates bfloat16 instead of rounding it
units = {torch.float32: 1.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}
links = {0.0: [CE()], 0.2: [CE(), Rooted(5.0), RootedConvex(4.0), Poly1()]}


def everything(tile, target, link, s, cut):
    width, rows = tile.shape[1], len(target)
    state = blocks.new_state(rows, tile, torch.float32)
    parts = [(0, tile[:, :cut]), (cut, tile[:, cut:])]
    for start, part in parts:
        blocks.statistics(part, target, state, link, s, first=start)
    found = blocks.finished(state, target, s, width=width)
    sums = torch.zeros(2, rows) if blocks.needs_spread(link, s) else None
    if sums is not None:
        for _, part in parts:
            blocks.spread(part, target, found, sums, link, s)
    losses = blocks.losses(found, sums, link, s)
    numbers = [*found[:3], torch.linspace(0.5, 2, rows)]
    if s.label_smoothing:
        numbers += [losses.slope * 0.8, losses.scale * 0.01]
    for start, part in parts:
        blocks.gradient(part, target, torch.stack(numbers), link, s, first=start)
    return losses.value, tile.float()


worst = {"loss": 0.0, "gradient": 0.0}
for dtype, (columns, cut), smoothing in itertools.product(
    units, ((1, 1), (131, 100)), (0.0, 0.2)
):
    for i, link in enumerate(links[smoothing]):
        cap = 5.0 if i % 2 == (columns > 1) else None
        tile = (torch.randn(6, columns + 3) * 3)[:, :columns].to(dtype)
        target = torch.randint(columns, (6,))
        target[2], target[4], target[5] = -100, columns + 5, -3
        s = Settings(dtype, columns, softcap=cap, label_smoothing=smoothing)
        results = []
        for kernels in (True, False):
            blocks.uses_kernels = lambda *a: kernels
            results.append(everything(tile.clone(), target, link, s, cut))
        (loss, grad), (expected, other) = results
        assert loss[:2].isfinite().all() and loss[4:].isnan().all() and loss[2:3].isnan().all()
        assert (grad[2] == 0).all()
        good = [0, 1, 3]
        size = 1 + expected[good].abs()
        worst["loss"] = max(worst["loss"], ((loss - expected)[good].abs() / size).max().item())
        gap = ((grad - other)[good].abs() / (1 + other[good].abs())).max().item()
        worst["gradient"] = max(worst["gradient"], gap / units[dtype])

# A block of -inf first: -inf - -inf is NaN.
blocks.uses_kernels = lambda *a: True
logits = torch.randn(2, 160)
logits[:, :128] = -torch.inf
target = torch.tensor([130, 159])
s = Settings(torch.float32, 160)
loss, _ = everything(logits.clone(), target, CE(), s, 64)
expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
worst["masked"] = (loss - expected).abs().max().item()
# No rows, no classes: nothing is launched.
everything(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), CE(), Settings(torch.float32, 5), 2)
print(json.dumps(worst))
"""


def test_the_kernels_agree_with_torch_over_blocks_smoothing_caps_and_wrong_labels():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert worst["loss"] < 3e-6
    assert worst["gradient"] < 2.0
    assert worst["masked"] < 1e-5
