"""A weight sharded over the vocabulary: exact cross entropy from three small all-reduces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rlo_core._compat import process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold the shards, as the two reductions that the loss needs."""

    group: ProcessGroup

    def max_(self, x: Tensor) -> Tensor:
        """Return the largest over the ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self.group)
        return x


def ranks_of(group_name: str) -> Ranks | None:
    """Return the ranks of a process group by its name; None for the empty name."""
    if not group_name:
        return None
    return Ranks(process_group(group_name))


@dataclass(frozen=True)
class Shard:
    """Where a weight's rows are in the whole vocabulary, and who has the others."""

    first_class: int
    classes: int
    group_name: str = ""


def local_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Shard]:
    """Return plain tensors and where the weight's rows belong; plain input comes back as it is.

    A DTensor weight must be `Shard(0)` (as torch's `ColwiseParallel` has it) or `Replicate` on a
    one-dimensional mesh; hidden may be plain and the same on all ranks, or any DTensor.
    """
    whole = Shard(0, weight.shape[0])
    if type(weight) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return hidden, weight, bias, whole  # before an import that takes 2 s
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    if not isinstance(weight, DTensor):
        return hidden, weight, bias, whole
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"a DTensor weight must be on a mesh of one dimension, got {mesh.ndim}; "
            "gather the data-parallel dimension first (FSDP does so inside the module's forward)"
        )
    (placement,) = weight.placements
    if isinstance(hidden, DTensor):
        hidden = hidden.redistribute(mesh, [Replicate()]).to_local()
    if isinstance(bias, DTensor):
        bias = bias.redistribute(mesh, [placement]).to_local()
    local = weight.to_local()
    if isinstance(placement, Replicate):
        return hidden, local, bias, whole
    if placement != Sharded(0):
        raise ValueError(f"a DTensor weight must be Shard(0) or Replicate, got {placement}")
    per_rank = -(-weight.shape[0] // mesh.size())
    first = min(per_rank * mesh.get_local_rank(), weight.shape[0])
    group = mesh.get_group()
    return hidden, local, bias, Shard(first, weight.shape[0], cast("str", group.group_name))
