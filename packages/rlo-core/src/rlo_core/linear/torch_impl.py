"""The oracle: all logits at once, from torch's operations, differentiable at will."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlo_core.functional import link_cross_entropy
from rlo_core.linear.settings import Settings
from rlo_core.links import Link


def torch_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    link: Link,
    settings: Settings,
) -> Tensor:
    """Return the loss of each token, (N), float32 or wider."""
    logits = F.linear(hidden, weight, bias)
    softcap = settings.softcap
    if softcap is not None:
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        logits = torch.tanh(wide / softcap) * softcap
    return link_cross_entropy(
        logits,
        target,
        link,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        reduction="none",
    )
