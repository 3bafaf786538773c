"""What all tests share: one thread, no network, and the optional folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

# Before any test module imports a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# How long one example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timm-tags", help="tags of it, with commas; every release if left out")
    parser.addoption("--timm-checkout", help="a clone of pytorch-image-models, for -m upstream")
    parser.addoption("--stylegan-checkout", help="a StyleGAN checkout, for -m upstream")
    parser.addoption("--transformers-checkout", help="a clone of transformers, for -m upstream")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and small real models beside the repository, where there are any."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data beside the repository (../shared/data)")
    return folder
