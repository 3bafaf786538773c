import pytest
import torch
from rlo_gptq.formats.gptq import GridLayer


@pytest.fixture
def make_layer():
    """A random layer, 64 outputs and 96 inputs; `zero=None` gives each group its own zero."""

    def make(bits: int, zero: float | None = None, group_size: int = 32) -> GridLayer:
        groups = 96 // group_size
        codes = torch.randint(0, 1 << bits, (64, 96), dtype=torch.uint8)
        zeros = (
            torch.randint(0, 1 << bits, (64, groups)).float()
            if zero is None
            else torch.full((64, groups), zero)
        )
        scales = (torch.rand(64, groups) + 0.01).half().float()
        return GridLayer(codes, scales, zeros, torch.arange(96) // group_size, bits)

    return make
