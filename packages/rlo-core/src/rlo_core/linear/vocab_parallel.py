"""The fused loss of a weight whose classes are spread over ranks, given shard by shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from rlo_core.functional import IGNORE_INDEX, Reduction
from rlo_core.linear.fused import sharded_loss
from rlo_core.linear.parallel import Shard
from rlo_core.links import Link

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    link: Link,
    *,
    first_class: int,
    classes: int,
    group: ProcessGroup | None = None,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    shift: bool = False,
    memory_budget: int | None = None,
) -> Tensor:
    r"""The loss of `link_linear_cross_entropy` where each rank holds some rows of the weight.

    Exact: per chunk of tokens, the maximum, the sum of exponentials and the target's logit are
    reduced over the ranks (three numbers per token), and the gradient of `hidden` once at the end.
    No rank ever sees another's logits. Give a DTensor weight to `link_linear_cross_entropy`.

    Args:
        hidden: (..., D), the same on every rank of the group.
        weight: (V_rank, D), this rank's rows: classes `first_class` to `first_class + V_rank - 1`.
        target: int64, (...), in [0, classes) or `ignore_index`; the same on every rank.
        link: The map from cross entropy to loss.
        first_class: Class of the first row of `weight`.
        classes: V, the rows of all ranks together.
        group: The ranks that hold the shards; None for all.
        bias: (V_rank) or None.
        ignore_index: As `link_linear_cross_entropy`, and so the rest.
        label_smoothing: In [0, 1].
        token_weight: (...), the same on every rank.
        reduction: "mean", "sum" or "none".
        softcap: Cap of the logits, or None.
        shift: Predict the next token's target.
        memory_budget: Bytes for the logits that exist at a time on this rank.

    Returns:
        The loss, the same on every rank; its gradient by `hidden` is the full one on every rank.

    Raises:
        ValueError: as `link_linear_cross_entropy`, and for a shard outside the vocabulary.
    """
    last = first_class + weight.shape[0]
    if first_class < 0 or last > classes:
        raise ValueError(
            f"the shard must lie in [0, {classes}), got classes {first_class} to {last - 1}"
        )
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("vocabulary parallelism needs torch.distributed to be initialised")
    return sharded_loss(
        hidden,
        weight,
        target,
        link,
        Shard(first_class, classes, group.group_name),
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        reduction=reduction,
        softcap=softcap,
        shift=shift,
        impl="auto",
        memory_budget=memory_budget,
        explain=False,
    )
