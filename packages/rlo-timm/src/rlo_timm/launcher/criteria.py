"""From the criterion that timm's train.py chose to ours, with everything that it asked for kept.

train.py decides by its flags between index targets, smoothed ones, soft ones from mixup, binary
ones and the Jensen-Shannon form. It has built a criterion of one of timm's classes by then; that
instance, read by class name and attributes, says which. Classes are known by name because the timm
in use is the one beside the user's script, of any release.
"""

from __future__ import annotations

from rlo_core.errors import RLOError
from rlo_core.functional import Reduction
from rlo_core.modules import BinaryLinkLoss
from rlo_core.registry import LossSpec, create_binary_loss, create_loss
from torch import Tensor, nn


class UnknownCriterionError(RLOError):
    """A criterion of the host that no registered loss can stand in for."""


class BinaryTargetLoss(nn.Module):
    r"""Binary loss of class scores, with the targets that timm's `BinaryCrossEntropy` makes.

    Index targets become :math:`(1-e)\,\text{onehot} + e/C`. Targets that have the shape of the
    logits (mixup, multi-label) stay, or move towards 1/2 by `e` where `smooth_dense` is set. With
    `target_threshold` every target becomes 1 above it and 0 below.

    Args:
        loss: The loss of each logit, with its own weights.
        smoothing: e, in [0, 1).
        target_threshold: None to keep fractional targets.
        sum_classes: Add over the classes and average over the batch, instead of averaging over
            both; `loss` has the reduction "none" then.
        smooth_dense: Smooth dense targets too.

    Source: `timm.loss.BinaryCrossEntropy` of timm 1.0.31, whose behaviour this reproduces.
    """

    def __init__(
        self,
        loss: BinaryLinkLoss,
        *,
        smoothing: float = 0.0,
        target_threshold: float | None = None,
        sum_classes: bool = False,
        smooth_dense: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.smoothing = smoothing
        self.target_threshold = target_threshold
        self.sum_classes = sum_classes
        self.smooth_dense = smooth_dense

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (N, C) for index targets (N) or dense ones (N, C)."""
        if target.shape != logits.shape:
            spread = self.smoothing / logits.shape[-1]
            index = target.long().view(-1, 1)
            target = logits.new_full(logits.shape, spread)
            target.scatter_(1, index, 1.0 - self.smoothing + spread)
        elif self.smooth_dense and self.smoothing:
            target = target * (1.0 - self.smoothing) + 0.5 * self.smoothing
        if self.target_threshold is not None:
            target = (target > self.target_threshold).to(logits.dtype)
        loss: Tensor = self.loss(logits, target.to(logits.dtype))
        return loss.sum(-1).mean() if self.sum_classes else loss


def counterpart(criterion: nn.Module, spec: LossSpec) -> nn.Module:
    """Return the criterion of `spec` that asks of its targets what `criterion` asks.

    Args:
        criterion: What train.py made: `CrossEntropyLoss`, `LabelSmoothingCrossEntropy`,
            `SoftTargetCrossEntropy`, `BinaryCrossEntropy` or `JsdCrossEntropy`.
        spec: The loss.

    Returns:
        A module called `loss(logits, target)`. For `JsdCrossEntropy` it is that instance, with the
        loss of its clean split replaced and the divergence as it was.

    Raises:
        UnknownCriterionError: a criterion of another class.
        SpecError: the loss cannot honour what was asked, e.g. has no binary form.
    """
    name = type(criterion).__name__
    if name == "CrossEntropyLoss" and isinstance(criterion, nn.CrossEntropyLoss):
        return create_loss(
            spec,
            weight=criterion.weight,
            ignore_index=criterion.ignore_index,
            label_smoothing=criterion.label_smoothing,
            reduction=criterion.reduction,
        )
    if name == "LabelSmoothingCrossEntropy":
        return create_loss(spec, label_smoothing=float(criterion.smoothing))  # type: ignore[arg-type]
    if name == "SoftTargetCrossEntropy":
        return create_loss(spec)
    if name == "BinaryCrossEntropy":
        return _binary(criterion, spec)
    if name == "JsdCrossEntropy":
        inner = criterion.cross_entropy_loss
        assert isinstance(inner, nn.Module)
        criterion.cross_entropy_loss = counterpart(inner, spec)
        return criterion
    raise UnknownCriterionError(
        f"loss '{spec}' cannot stand in for {name}; it can for CrossEntropyLoss, "
        "LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, BinaryCrossEntropy and JsdCrossEntropy"
    )


def _binary(criterion: nn.Module, spec: LossSpec) -> BinaryTargetLoss:
    """Read timm's `BinaryCrossEntropy`; attributes that came later are absent from old releases."""
    reduction: Reduction = criterion.reduction  # type: ignore[assignment]
    weight, pos_weight = criterion.weight, criterion.pos_weight
    assert weight is None or isinstance(weight, Tensor)
    assert pos_weight is None or isinstance(pos_weight, Tensor)
    threshold = criterion.target_threshold
    return BinaryTargetLoss(
        create_binary_loss(spec, weight=weight, pos_weight=pos_weight, reduction=reduction),
        smoothing=float(criterion.smoothing),  # type: ignore[arg-type]
        target_threshold=None if threshold is None else float(threshold),  # type: ignore[arg-type]
        sum_classes=bool(getattr(criterion, "sum_classes", False)),
        smooth_dense=bool(getattr(criterion, "smooth_dense", False)),
    )
