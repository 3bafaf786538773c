"""The processes that `torchrun` started, or the one there is without it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rlo_core.errors import RLOError
from torch import Tensor

from rlo_gptq.calibration.hessian_sum import HessianSum


class DeviceError(RLOError):
    """A device that torch does not know or cannot use."""


@dataclass(frozen=True)
class Processes:
    """One of `world` processes, number `rank`, working on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the indices in 0..count-1 that are this process's work."""
        return range(self.rank, count, self.world)

    def sum_hessian(self, hessian: HessianSum) -> None:
        """Add up one sum over all processes, in place, keeping its carry."""
        if self.world == 1:
            return
        counts = torch.tensor([float(hessian.weight), float(hessian.tokens)], dtype=torch.float64)
        counts = counts.to(hessian.total.device)
        for tensor in (hessian.total, hessian.carry, counts):
            dist.all_reduce(tensor)
        hessian.weight = counts[:1].cpu()
        hessian.tokens = int(counts[1])

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over all processes, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the value that process `source` has: tensors and plain values, nested."""
        if self.world == 1:
            return value
        # Structure first, as plain objects; then each tensor by itself, into memory of its shape.
        shapes: list[Any] = [_describe(value) if self.rank == source else None]
        dist.broadcast_object_list(shapes, src=source, device=self.device)
        filled = value if self.rank == source else _allocate(shapes[0], self.device)
        for tensor in _tensors(filled):
            moved = tensor.to(self.device)
            dist.broadcast(moved, src=source)
            if self.rank != source:
                tensor.copy_(moved)
        return filled

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype).removeprefix("torch."))
    if isinstance(value, dict):
        return ("dict", {key: _describe(item) for key, item in value.items()})
    return ("plain", value)


def _allocate(described: Any, device: torch.device) -> Any:
    kind, *rest = described
    if kind == "tensor":
        return torch.empty(rest[0], dtype=getattr(torch, rest[1]), device=device)
    if kind == "dict":
        return {key: _allocate(item, device) for key, item in rest[0].items()}
    return rest[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def pick_device(device: str) -> torch.device:
    """Return the device for a name; "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        DeviceError: there is no such device.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise DeviceError(f"device {device!r} cannot be used: {reason}") from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes of `torchrun` (NCCL on GPUs, gloo on CPUs) for the time of the block."""
    chosen = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        rank = dist.get_rank() if dist.is_initialized() else 0
        yield Processes(rank, dist.get_world_size() if dist.is_initialized() else 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, chosen)
    finally:
        dist.destroy_process_group()
