"""Tests that run on a CUDA device: `pytest -m gpu tests/gpu/device`.

Without a device all are skipped, for one reason. `RLO_REHEARSE=cpu` runs what does not need one on
the CPU instead, to check the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REHEARSAL = os.environ.get("RLO_REHEARSE") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = torch.cuda.is_available()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        needs_kernels = item.get_closest_marker("kernels") is not None
        if not there and (needs_kernels or not REHEARSAL):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The first GPU, or the CPU in a rehearsal."""
    return torch.device("cpu" if REHEARSAL and not torch.cuda.is_available() else "cuda:0")


@pytest.fixture(params=["cuda:0", "cuda:1"])
def each_device(request: pytest.FixtureRequest) -> torch.device:
    """Both GPUs of a machine with two."""
    name = torch.device(request.param)
    if torch.cuda.device_count() <= (name.index or 0):
        pytest.skip("no second CUDA device")
    return name


@pytest.fixture(autouse=True)
def fresh_random_numbers() -> int:
    """New inputs in every run; the seed is printed where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed
