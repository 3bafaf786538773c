"""The CUDA kernels, run by Triton's interpreter on the CPU, against the torch path."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROUNDING = """
import json
import torch
from rlo_gptq.rounding.grids import fit_grid
from rlo_gptq.rounding import feedback, greedy
from rlo_gptq.settings import LayerSettings

torch.set_num_threads(1)
torch.manual_seed(0)
found = {"feedback": [], "greedy": [], "targets": 0.0, "values": 0.0, "changed": []}
for bits, d, m, group_size, block in ((2, 24, 40, -1, 16), (3, 21, 33, 8, 128), (4, 16, 5, 0, 7)):
    x = torch.randn(3 * d, d)
    H = x.T @ x / d + 0.05 * torch.eye(d)
    W = torch.randn(d, m)
    W[:, 0] = 0
    options = LayerSettings(bits=bits, group_size=group_size)
    grid = fit_grid(W, torch.ones(d), options)
    order = torch.randperm(d)
    N = feedback.factor(H[order][:, order]).feedback
    results, states = [], []
    for kernels in (False, True):
        feedback.kernels_apply = greedy.kernels_apply = lambda *a: kernels
        results.append(feedback.round_with_feedback(W[order], N, grid, order, block_size=block))
        state = greedy.start(W[order], H[order][:, order], results[0][0].clone(), grid, order)
        found["changed"].append(int(greedy.greedy_pass(state, grid, block_size=block)))
        states.append(state)
    found["feedback"].append((results[0][0] != results[1][0]).float().mean().item())
    found["targets"] = max(found["targets"], (results[0][1] - results[1][1]).abs().max().item())
    found["greedy"].append((states[0].codes != states[1].codes).float().mean().item())
    found["values"] = max(found["values"], (states[0].values - states[1].values).abs().max().item())
print(json.dumps(found))
"""

MATMUL = """
import json
import torch
from rlo_gptq.packed import product
from rlo_gptq.packed.matmul_kernel import packed_matmul
from rlo_gptq.packed.packing import pack_codes
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings

torch.set_num_threads(1)
torch.manual_seed(0)
worst = 0.0
cases = (
    (2, 6, 70, -1, 1), (2, 5, 2100, 64, 3), (2, 3, 64, 16, 1), (3, 7, 135, 32, 2),
    (4, 5, 65, 0, 5), (4, 3, 64, 8, 1), (5, 3, 100, 32, 1), (6, 3, 40, -1, 1), (8, 3, 9, 0, 1),
)
for bits, m, d, group_size, n in cases:
    codes = torch.randint(1 << bits, (m, d), dtype=torch.uint8)
    groups = 1 if group_size < 1 else -(-d // group_size)
    group = torch.zeros(d, dtype=torch.long) if group_size < 1 else torch.arange(d) // group_size
    scales = torch.rand(m, groups) + 0.1
    x, bias, scale = torch.randn(n, d), torch.randn(m), torch.rand(d) + 0.5
    order = torch.randperm(d, dtype=torch.int32)
    for zeros in (1.5, torch.rand(m, groups) * 3):
        z = zeros if isinstance(zeros, float) else zeros[:, group]
        dense = (scales[:, group] * (codes.float() - z)).double()
        packed = pack_codes(codes, bits)
        y = packed_matmul(x, packed, scales, zeros, bits=bits, group_size=group_size)
        expected = x.double() @ dense.T
        worst = max(worst, ((y - expected).abs().max() / expected.abs().max()).item())
    around = packed_matmul(
        x, packed, scales, zeros, bits=bits, group_size=group_size,
        bias=bias, input_scale=scale, order=order)
    expected = (x * scale).double()[:, order.long()] @ dense.T + bias
    worst = max(worst, ((around - expected).abs().max() / expected.abs().max()).item())
for options, size in (
    (LayerSettings(bits=3, group_size=32, sym=False, incoherence="hadamard", rescale=True), 64),
    (LayerSettings(grid="trellis", method="nearest", group_size=16), 48),
    (LayerSettings(bits=4, rescale=True, method="nearest"), 24),
):
    layer = quantize_layer(torch.randn(9, size), torch.eye(size), options, seed=0)
    module, x = QuantLinear.from_layer(layer, options, bias=torch.randn(9)), torch.randn(2, size)
    plain = module(x)
    applies, product.kernel_applies = product.kernel_applies, lambda *a: True
    worst = max(worst, ((module(x) - plain).abs().max() / plain.abs().max()).item())
    product.kernel_applies = applies
print(json.dumps(worst))
"""


def interpreted(program: str):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_rounding_kernels_give_the_codes_of_the_torch_path():
    found = interpreted(ROUNDING)
    assert max(found["feedback"]) < 0.01
    assert max(found["greedy"]) < 0.01
    assert found["targets"] < 1e-3
    assert found["values"] < 1e-3
    assert max(found["changed"]) > 0


def test_the_packed_product_is_the_product_with_the_dequantised_weight():
    assert interpreted(MATMUL) < 1e-5
