"""The layer generator: weights and Hessians like those of a trained transformer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rlo_gptq.synthetic import make_layer
from torch import Tensor


@pytest.fixture(scope="session")
def layer() -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """The generator, as a fixture: (m, d, seed) -> weight, hessian."""
    return make_layer
