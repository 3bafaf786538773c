"""The fused linear loss as an `nn.Module`."""

from __future__ import annotations

from torch import Tensor, nn

from rlo_core._arguments import check_reduction, check_smoothing
from rlo_core.functional import IGNORE_INDEX, Reduction
from rlo_core.linear.arguments import Impl
from rlo_core.linear.fused import link_linear_cross_entropy
from rlo_core.links import Link
from rlo_core.modules import LinkLoss


class LinkLinearCrossEntropy(nn.Module):
    """Any link, fused with the last linear layer; see `link_linear_cross_entropy`.

    Takes a criterion instead of a link where one is at hand, and then follows its schedule. The
    weight belongs to the model and is an argument of the call.

    Args:
        link: A link, or a criterion that has one (`RootedLoss(k=5)`).
        ignore_index: As `link_linear_cross_entropy`, and so the rest.
        label_smoothing: In [0, 1].
        reduction: "mean", "sum" or "none".
        softcap: Cap of the logits, or None.
        shift: Predict the next token's target.
        impl: "auto", "chunked", "two-pass", "torch" or "cce".
        memory_budget: Bytes for the logits that exist at a time.
    """

    def __init__(
        self,
        link: Link | LinkLoss,
        *,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        shift: bool = False,
        impl: Impl = "auto",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_smoothing(label_smoothing)
        self.criterion = link if isinstance(link, LinkLoss) else LinkLoss(link)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.softcap = softcap
        self.shift = shift
        self.impl: Impl = impl
        self.memory_budget = memory_budget

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; shapes as `link_linear_cross_entropy`."""
        return link_linear_cross_entropy(
            hidden,
            weight,
            target,
            self.criterion.link,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            reduction=self.reduction,
            softcap=self.softcap,
            shift=self.shift,
            impl=self.impl,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """Show what is not at its default."""
        parts = [f"reduction={self.reduction!r}"]
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap}")
        if self.shift:
            parts.append("shift=True")
        if self.impl != "auto":
            parts.append(f"impl={self.impl!r}")
        return ", ".join(parts)
