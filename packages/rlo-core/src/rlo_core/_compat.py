"""What core uses of its peers that they do not promise: all of it is here, and nowhere else.

`PRIVATE` names each with the version in which it was seen; the upper bounds in pyproject.toml are
there because of them, and a test says which peer has lost one. scikit-learn's are in
`rlo_core.linear_model._compat`, which imports no torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor as FakeTensor
from torch.autograd import forward_ad

PRIVATE: tuple[tuple[str, str, str, str], ...] = (
    ("torch", "2.15.0", "torch._subclasses", "FakeTensor"),
    ("torch", "2.15.0", "torch", "_assert_async"),
    ("torch", "2.15.0", "torch._C", "_are_functorch_transforms_active"),
    ("torch", "2.15.0", "torch._C._functorch", "is_functorch_wrapped_tensor"),
    ("torch", "2.15.0", "torch.autograd.forward_ad", "_current_level"),
    ("torch", "2.15.0", "torch.autograd.forward_ad", "_set_fwd_grad_enabled"),
    ("torch", "2.15.0", "torch.distributed.distributed_c10d", "_resolve_process_group"),
)
"""Peer, the version in which it was seen, module, name (with dots for what is in a class)."""

assert_async = torch._assert_async
"""Fail on the device, without waiting for it, if a tensor is 0."""

transforms_active = torch._C._are_functorch_transforms_active
"""Return whether a `torch.func` transform is at work."""


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor is one that a `torch.func` transform has wrapped."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def forward_mode() -> bool:
    """Return whether forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0


def forward_mode_enabled() -> AbstractContextManager[Any]:
    """Return a context in which forward-mode derivatives are recorded, inside of a `jvp` too."""
    return forward_ad._set_fwd_grad_enabled(True)  # type: ignore[no-any-return, unused-ignore]


def process_group(name: str) -> Any:
    """Return the process group of a name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]
