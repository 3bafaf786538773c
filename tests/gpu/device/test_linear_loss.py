"""Fused linear losses and their kernels on a GPU, against float64 on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from rlo_core import CE, Link, Poly1, Rooted, RootedConvex, link_linear_cross_entropy
from rlo_core.functional import link_cross_entropy
from rlo_core.linear import blocks
from rlo_core.linear.settings import Settings
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = [torch.float32, *HALF]
UNIT = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LINKS = [CE(), Rooted(5.0), RootedConvex(4.0), Poly1()]


def passes(
    tile: Tensor, target: Tensor, link: Link, s: Settings, cut: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, scale and unscaled gradient of a tile taken in two blocks."""
    width, n = tile.shape[1], len(target)
    state = blocks.new_state(n, tile, torch.float32)
    parts = [(0, tile[:, :cut]), (cut, tile[:, cut:])]
    for start, part in parts:
        blocks.statistics(part, target, state, link, s, first=start)
    rows = blocks.finished(state, target, s, width=width)
    sums = torch.zeros(2, n, device=tile.device) if blocks.needs_spread(link, s) else None
    if sums is not None:
        for _, part in parts:
            blocks.spread(part, target, rows, sums, link, s)
    found = blocks.losses(rows, sums, link, s)
    numbers = [*rows[:3], found.scale]
    if s.label_smoothing:
        numbers += [found.slope * (1 - s.label_smoothing)]
        numbers += [torch.full_like(found.scale, s.label_smoothing / s.classes)]
    for start, part in parts:
        blocks.gradient(part, target, torch.stack(numbers), link, s, first=start)
    return found.value, found.scale, tile


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 63, 1000, 8192, 50_257])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_any_width_have_the_loss_and_gradient_of_float64(
    device, dtype, columns, cap, smoothing
):
    link = LINKS[columns % 4] if smoothing else CE()
    n = 37
    store = torch.full((n, columns + 5), torch.nan, device=device, dtype=dtype)
    tile = store[:, :columns]
    tile.copy_(torch.randn(n, columns, device=device) * 3)
    target = torch.randint(columns, (n,), device=device)
    target[3] = -100
    exact = tile.double().cpu().requires_grad_()
    z = exact if cap is None else cap * torch.tanh(exact / cap)
    truth = link_cross_entropy(z, target.cpu(), link, label_smoothing=smoothing, reduction="none")
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    s = Settings(dtype, columns, softcap=cap, label_smoothing=smoothing)
    loss, _, grad = passes(tile, target, link, s, columns // 2)
    kept = (target != -100).cpu()
    torch.testing.assert_close(
        loss.double().cpu()[kept], truth.detach()[kept], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(grad.double().cpu(), slope, rtol=UNIT[dtype], atol=UNIT[dtype])
    assert torch.isnan(store[:, columns:]).all()  # nothing was written beside the tile


@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_linear_loss_has_the_gradients_of_float64(device, impl, reduction, dtype, smoothing):
    n, d, v = 301, 48, 1003
    link = Rooted(5.0)
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(v, device=device).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), device=device)
    target[::7] = -100
    factor = torch.rand(n, device=device)
    pull = torch.linspace(0.5, 1.5, n, device=device) if reduction == "none" else 1.0
    loss = link_linear_cross_entropy(
        hidden,
        weight,
        target,
        link,
        bias=bias,
        reduction=reduction,
        impl=impl,
        label_smoothing=smoothing,
        token_weight=factor,
        memory_budget=100 * v * 4,
    )
    found = torch.autograd.grad((loss * pull).sum(), (hidden, weight, bias))
    leaves = [x.detach().double().cpu().requires_grad_() for x in (hidden, weight, bias)]
    exact = link_cross_entropy(
        F.linear(*leaves), target.cpu(), link, label_smoothing=smoothing, reduction="none"
    )
    exact = exact * factor.double().cpu()
    if reduction == "mean":
        exact = exact.sum() / factor[target != -100].double().sum().cpu()
    weights = pull.double().cpu() if isinstance(pull, Tensor) else pull
    total = (exact * weights).sum()
    truth = torch.autograd.grad(total, leaves)
    own = (loss * pull).sum().double().cpu()
    torch.testing.assert_close(own, total.detach(), rtol=UNIT[dtype], atol=1e-4)
    for a, b in zip(found, truth, strict=True):
        off = (a.double().cpu() - b).norm() / b.norm()
        assert off < UNIT[dtype], off


@pytest.mark.kernels
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
@pytest.mark.parametrize("label", [20, 25, -3])
def test_a_wrong_label_stops_the_device_with_a_message(impl, label):
    """In a process of its own: the device cannot be used afterwards."""
    program = f"""
import torch
from rlo_core import CE, link_linear_cross_entropy
h = torch.randn(4, 8, device="cuda", requires_grad=True)
w = torch.randn(20, 8, device="cuda", requires_grad=True)
y = torch.tensor([0, {label}, 1, 2], device="cuda")
loss = link_linear_cross_entropy(h, w, y, CE(), impl="{impl}")
print(loss.item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.kernels
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_two_streams_give_what_one_gives(device, impl):
    hidden = torch.randn(2, 500, 64, device=device)
    weight = torch.randn(5000, 64, device=device)
    target = torch.randint(5000, (2, 500), device=device)
    alone = [
        link_linear_cross_entropy(h, weight, y, CE(), impl=impl)
        for h, y in zip(hidden, target, strict=True)
    ]
    torch.cuda.synchronize()
    streams, together = [torch.cuda.Stream() for _ in range(2)], []
    for stream, h, y in zip(streams, hidden, target, strict=True):
        with torch.cuda.stream(stream):
            together.append(link_linear_cross_entropy(h, weight, y, CE(), impl=impl))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("impl", ["chunked", "two-pass"])
def test_a_step_can_be_captured_in_a_graph(device, impl):
    hidden = torch.randn(256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4000, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(4000, (256,), device=device)

    def step() -> tuple[Tensor, ...]:
        loss = link_linear_cross_entropy(hidden, weight, target, Rooted(5.0), impl=impl)
        return (loss, *torch.autograd.grad(loss, (hidden, weight)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    hidden.data.copy_(torch.randn_like(hidden))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.kernels
def test_a_loss_runs_where_its_tensors_are(each_device):
    hidden = torch.randn(64, 32, device=each_device, requires_grad=True)
    weight = torch.randn(500, 32, device=each_device, requires_grad=True)
    target = torch.randint(500, (64,), device=each_device)
    loss = link_linear_cross_entropy(hidden, weight, target, CE(), impl="two-pass")
    loss.backward()
    exact = F.cross_entropy(hidden.detach() @ weight.detach().T, target)
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_two_passes_hold_no_float32_copy_of_the_weight(device):
    n, d, v = 2048, 512, 64_000
    hidden = torch.randn(n, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(v, (n,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    link_linear_cross_entropy(hidden, weight, target, CE(), impl="two-pass").backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * v * d + 3 * 2 * n * 8192
