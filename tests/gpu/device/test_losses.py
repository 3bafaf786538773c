"""Every loss on a GPU, against itself in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from rlo_core import create_loss

LOSSES = ["ce", "rlo:k=5", "rlo:k=8,m=10", "rlo-convex:k=3", "focal", "gce", "dft", "poly1"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("spec", LOSSES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_a_loss_and_its_gradient_are_those_of_float64(device, spec, dtype, kind):
    logits = torch.randn(33, 101, device=device).to(dtype).requires_grad_()
    target = torch.randint(101, (33,), device=device)
    if kind == "soft":
        target = torch.rand(33, 101, device=device).to(dtype).softmax(-1)
    else:
        target[5] = -100
    criterion = create_loss(spec)
    loss = criterion(logits, target)
    loss.backward()
    exact = logits.detach().double().cpu().requires_grad_()
    truth = criterion(exact, target.double().cpu() if kind == "soft" else target.cpu())
    truth.backward()
    close = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double().cpu(), truth.detach(), rtol=close, atol=close)
    torch.testing.assert_close(logits.grad.double().cpu(), exact.grad, rtol=close, atol=close / 10)


@pytest.mark.parametrize("spec", ["ce", "rlo:k=5", "rlo-convex:k=3"])
def test_a_loss_under_autocast_is_computed_in_float32(device, spec):
    model = torch.nn.Linear(16, 10).to(device)
    x, target = torch.randn(8, 16, device=device), torch.randint(10, (8,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = create_loss(spec)(model(x), target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
