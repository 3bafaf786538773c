"""Per-token cross entropy from Apple's cut-cross-entropy (optional), with the link on top."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rlo_core._cross_entropy import apply_link
from rlo_core.linear.link_codes import slope_is_bounded
from rlo_core.linear.settings import Settings
from rlo_core.links import Link

HOW_TO_INSTALL = "pip install 'rlo-core[cce]'"


def check_cce(hidden: Tensor, bias: Tensor | None, settings: Settings) -> None:
    """Raise ValueError or ImportError where cut-cross-entropy cannot do what was asked."""
    if bias is not None:
        raise ValueError("impl='cce' takes no bias; use impl='chunked'")
    if settings.label_smoothing > 0.0:
        raise ValueError(
            f"impl='cce' takes no label_smoothing, got {settings.label_smoothing}; "
            "use impl='chunked'"
        )
    if hidden.device.type != "cuda":
        raise ValueError(f"impl='cce' needs a CUDA device, got {hidden.device}; use impl='chunked'")
    if settings.compute not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"impl='cce' needs float16 or bfloat16, got {settings.compute}; use autocast or "
            "impl='chunked'"
        )


def filter_eps(link: Link) -> str | None:
    """The gradient filter to ask for: the package's own, but none where a slope may grow.

    It drops blocks whose softmax is below the precision of bfloat16, before the row's scale is
    known. A bounded slope keeps what is dropped small; that of the convex link, or of a link of
    your own, may have no bound.
    """
    return "auto" if slope_is_bounded(link) else None


def cce_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, link: Link, settings: Settings
) -> Tensor:
    """Return the loss of each token, (N), float32.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise ImportError(
            f"impl='cce' needs the package cut-cross-entropy: {HOW_TO_INSTALL}"
        ) from error
    ce = linear_cross_entropy(
        hidden.to(settings.compute),
        weight.to(settings.compute),
        target,
        ignore_index=settings.ignore_index,
        softcap=settings.softcap,
        reduction="none",
        filter_eps=filter_eps(link),
    )
    return apply_link(cast("Tensor", ce), link)
