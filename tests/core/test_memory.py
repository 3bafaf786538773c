"""Peak memory of loss and gradient, counted by torch's allocator, beside cross entropy's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rlo_core import rooted_convex_loss, rooted_loss
from torch import Tensor


def peak_bytes(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> int:
    """The most that was allocated at a time on top of logits and target."""
    loss(logits, target).backward()  # what is made once is made here
    logits.grad = None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss(logits, target).backward()
    logits.grad = None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("loss", [rooted_loss, rooted_convex_loss])
@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "bound"),
    [
        (1024, 1000, torch.float32, 1.01),
        (1024, 1000, torch.bfloat16, 1.01),
        (512, 50272, torch.float32, 1.01),
        (512, 50272, torch.bfloat16, 1.01),
    ],
)
def test_the_peak_is_that_of_cross_entropy(
    loss: Callable[[Tensor, Tensor], Tensor],
    rows: int,
    classes: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    logits = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    reference = peak_bytes(F.cross_entropy, logits, target)
    assert reference >= 3 * logits.nbytes  # the measurement sees what it is to see
    assert peak_bytes(loss, logits, target) <= bound * reference
