"""The oracle: all logits at once, from torch's operations, differentiable at will."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_core.functional import link_cross_entropy
from rlo_core.links import Link


def torch_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    link: Link,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """Return the loss of each token, (N), float32 or wider."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        logits = torch.tanh(wide / softcap) * softcap
    return link_cross_entropy(
        logits,
        target,
        link,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
