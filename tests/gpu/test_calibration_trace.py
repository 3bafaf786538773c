"""Hidden states of calibration sequences on their way to a fake CUDA device and back."""

from __future__ import annotations

import pytest
import torch
from gpu_trace import fake_gpu
from rlo_gptq.calibration.block_inputs import Activations


@pytest.mark.parametrize(("pinned", "waits"), [(True, 0), (False, 2)])
def test_pinned_hidden_states_are_copied_without_a_wait(pinned, waits, monkeypatch):
    """Pinning itself needs a driver, so the store is made without; its copies are what is seen."""
    store = Activations(3, 5, 4, torch.float32)
    store.pinned = pinned
    with fake_gpu() as trace:
        hidden = store.get(1, torch.device("cuda:0"))
        assert hidden.device == torch.device("cuda:0")
        store.set(1, hidden * 2)
    assert sum(trace.syncs.values()) == waits, trace.summary()


def test_a_store_on_the_cpu_gives_back_what_was_put_in():
    store = Activations(3, 5, 4, torch.bfloat16)
    assert not store.pinned
    hidden = torch.randn(1, 5, 4)
    store.set(2, hidden)
    assert torch.equal(store.get(2, torch.device("cpu")), hidden.bfloat16())
