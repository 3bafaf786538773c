"""What a host asks of a loss: its sum over kept tokens, to be divided by a count the host knows.

Under gradient accumulation a mean per batch is wrong; the sum divided by the tokens of all batches
is the mean of the one big batch. So every way into this package goes through `Objective.total`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rlo_core._cross_entropy import apply_link
from rlo_core.errors import SpecError
from rlo_core.functional import link_binary_cross_entropy, link_cross_entropy
from rlo_core.gates import (
    Gate,
    GatedLoss,
    gate_factor,
    needs_of,
    row_statistics,
    top_of,
)
from rlo_core.links import Link
from rlo_core.registry import LossSpec, create_loss, link_of
from rlo_core.terms import KL, AnchoredLoss
from torch import Tensor, nn

IGNORE_INDEX = -100
Loss = str | LossSpec | nn.Module | type[nn.Module] | Callable[..., Tensor]
"""A spec (`"rlo:k=5,m=5"`), a criterion, its class, or any `loss(logits, target) -> Tensor`."""

_ROWS = 512
"""Rows of logits that evaluation holds in float32 at one time."""


class Objective:
    """A loss as the hosts use it.

    Args:
        loss: Spec, criterion, class or callable. A callable is given (N, C) logits and (N) labels
            without ignored ones; with a `reduction` option it is asked for a sum, without one its
            scalar is taken as a mean. The `reduction` of a criterion is not used.
        label_smoothing: In [0, 1]; honoured by losses that have a link or take the option.
        anchored: Whether the door can give the reference of a loss with `+kl`; its terms are then
            in `terms`, and not in what this class computes.

    Raises:
        SpecError: unknown loss, or one that cannot honour the smoothing.
        TypeError: not a loss.
    """

    def __init__(self, loss: Loss, *, label_smoothing: float = 0.0, anchored: bool = False) -> None:
        self.name = str(loss) if isinstance(loss, (str, LossSpec)) else _name_of(loss)
        self.criterion = _criterion(loss, label_smoothing)
        self.terms: tuple[KL, ...] = ()
        if isinstance(self.criterion, AnchoredLoss):
            if not anchored:
                raise SpecError(
                    f"loss {self.name!r} needs a reference model, which this door cannot give; use "
                    "rlo_hf.Trainer or rlo_hf.trl.SFTTrainer (reference_model=)"
                )
            self.terms, self.criterion = self.criterion.terms, self.criterion.criterion
        _refuse_foreign(self.criterion, self.name)
        own = getattr(self.criterion, "label_smoothing", 0.0)
        if own and label_smoothing and own != label_smoothing:
            raise SpecError(
                f"label smoothing is given twice, as {own} in the loss and as {label_smoothing}"
            )
        self.label_smoothing: float = own or label_smoothing
        if self.label_smoothing and self.link is None and not own:
            raise SpecError(
                f"loss {self.name!r} has no link, so it cannot honour "
                f"label_smoothing={label_smoothing}"
            )
        self._summed = _with_sum(self.criterion)
        self.more_gates: tuple[Gate, ...] = ()
        for gate in self.gates:
            if "reference_ce" in gate.needs:
                raise SpecError(
                    f"loss {self.name!r} needs the losses of a reference model, which the trainers "
                    "cannot give; use rlo_core.linear.gated_linear_cross_entropy(reference_ce=...)"
                )

    def add_gate(self, gate: Gate) -> None:
        """Multiply the loss of each token by one more gate.

        Raises:
            SpecError: the loss has no link, class weights or smoothing.
        """
        if self.link is None or self.weight is not None or self.label_smoothing:
            raise SpecError(
                "weights= needs a loss with a link, without class weights and label smoothing, got "
                f"{self.name!r}"
            )
        self.more_gates = (*self.more_gates, gate)

    @property
    def link(self) -> Link | None:
        """The link in force (a schedule moves it), or None; `gates` multiply what it gives."""
        if isinstance(self.criterion, GatedLoss):
            return self.criterion.gated_link
        return link_of(self.criterion) if isinstance(self.criterion, nn.Module) else None

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Detached factors of each token's loss."""
        own = self.criterion.gates if isinstance(self.criterion, GatedLoss) else ()
        return (*own, *self.more_gates)

    @property
    def weight(self) -> Tensor | None:
        """Class weights, (C), or None."""
        weight = getattr(self.criterion, "weight", None)
        return weight if isinstance(weight, Tensor) else None

    def canonical(self, target: Tensor) -> Tensor:
        """Return int64 labels with the criterion's own `ignore_index` as -100."""
        ignored = getattr(self.criterion, "ignore_index", IGNORE_INDEX)
        target = target.long()
        return target if ignored == IGNORE_INDEX else target.masked_fill(target == ignored, -100)

    def count(self, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what the mean divides by: kept labels, or the sum of their weights.

        Args:
            target: As `total`, any shape.
            weights: Token weights, the shape of `target`; None for ones.
        """
        kept = target != IGNORE_INDEX
        if weights is not None:
            share = weights.to(target.device).where(kept, 0.0)
            if self.weight is None or target.is_floating_point():
                return share.sum()
            return (self.weight.to(target.device)[target.masked_fill(~kept, 0)] * share).sum()
        if self.weight is None or target.is_floating_point():
            return kept.sum()
        return self.weight.to(target.device)[target.masked_fill(~kept, 0)].mul(kept).sum()

    def total(self, logits: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the loss summed over kept labels, a scalar with gradient.

        Args:
            logits: (N, C).
            target: (N) int64, -100 ignored.
            weights: (N) token weights; None for ones.
        """
        link = self.link
        if self.gates or weights is not None:
            return self._weighted(logits, target, weights)
        if link is not None:
            return link_cross_entropy(
                logits,
                target,
                link,
                weight=None if self.weight is None else self.weight.to(logits.device),
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
        kept = target != IGNORE_INDEX
        if not bool(kept.any()):
            return logits.sum() * 0.0
        value = self._summed(logits[kept], target[kept])
        if value.dim() == 0 and self._summed is self.criterion:
            return value * kept.sum()
        return value.sum()

    def _weighted(self, logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        link, gates = self.link, self.gates
        if link is None:
            raise SpecError(f"loss {self.name!r} has no link, so it cannot honour loss_weight")
        kept = target != IGNORE_INDEX
        part, labels = logits[kept], target[kept]
        loss = link_cross_entropy(
            part,
            labels,
            link,
            weight=None if self.weight is None else self.weight.to(logits.device),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if weights is not None:
            loss = loss * weights.to(loss.device)[kept]
        if gates:
            rows = row_statistics(part, labels, needs=needs_of(gates), top=top_of(gates))
            loss = loss * gate_factor(gates, rows)
        return loss.sum()

    def binary_total(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the multi-label loss summed over kept entries; both (B, C), `target` in [0, 1]."""
        return self._binary(logits, target).sum()

    def _binary(self, logits: Tensor, target: Tensor) -> Tensor:
        link = self.link
        if link is None or self.gates:
            what = "no link" if link is None else "gates"
            raise SpecError(f"loss {self.name!r} has {what}, so it has no multi-label form")
        kept = target != IGNORE_INDEX
        loss = link_binary_cross_entropy(
            logits, target.to(logits.dtype).where(kept, 0.0), link, reduction="none"
        )
        return loss.where(kept, 0.0)

    @torch.no_grad()
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return for each row of a batch what evaluation sums, (B, 4) float32.

        The columns are objective, its count (`count`), cross entropy in nats, kept labels.

        Args:
            logits: (B, ..., C).
            target: (B, ...) int64; or (B, C) floating for a multi-label problem.
        """
        if target.is_floating_point():
            objective = self._binary(logits, target).float().flatten(1).sum(1)
            ce = F.binary_cross_entropy_with_logits(
                logits.float(), target.float(), reduction="none"
            )
            kept = target != IGNORE_INDEX
            count = kept.flatten(1).sum(1)
            return torch.stack([objective, count, (ce * kept).flatten(1).sum(1), count], dim=1)
        return torch.stack(
            [
                self._row(row.reshape(-1, row.shape[-1]), labels.reshape(-1))
                for row, labels in zip(logits, target, strict=True)
            ]
        )

    def _row(self, logits: Tensor, target: Tensor) -> Tensor:
        link = self.link if not self.gates else None  # a gate may rank the tokens of a row
        plain = self.weight is None and not self.label_smoothing
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(target), _ROWS):
            part, labels = logits[start : start + _ROWS].float(), target[start : start + _ROWS]
            ce = F.cross_entropy(part, labels, ignore_index=IGNORE_INDEX, reduction="none")
            if link is not None and plain:
                objective = apply_link(ce, link).where(labels != IGNORE_INDEX, 0.0).double().sum()
            elif link is not None:
                objective = self.total(part, labels)
            else:
                objective = torch.zeros(())
            sums += torch.stack([objective.double(), ce.double().sum()]).cpu()
        if link is None:  # a foreign loss may couple the tokens of a row: give it all of them
            sums[0] = self.total(logits.float(), target).double().cpu()
        count = self.count(target).double().cpu()
        kept = (target != IGNORE_INDEX).sum().double().cpu()
        return torch.stack([sums[0], count, sums[1], kept]).float().to(logits.device)


_CLASSIFIERS = ("CrossEntropyLoss", "MultiMarginLoss", "cross_entropy", "multi_margin_loss")


def _refuse_foreign(criterion: Any, name: str) -> None:
    """Raise SpecError for torch's own losses that do not take logits and class labels."""
    kind = type(criterion) if isinstance(criterion, nn.Module) else criterion
    module, own = getattr(kind, "__module__", ""), getattr(kind, "__name__", "")
    torchs = module in ("torch.nn.modules.loss", "torch.nn.functional")
    if torchs and own not in _CLASSIFIERS:
        raise SpecError(
            f"loss must take logits (N, C) and class labels (N), and torch's {own} does not; "
            "of torch's losses CrossEntropyLoss and MultiMarginLoss do"
        )


def _name_of(loss: object) -> str:
    if isinstance(loss, nn.Module):
        return str(loss)
    return getattr(loss, "__name__", type(loss).__name__)


def _criterion(loss: Loss, label_smoothing: float) -> Callable[..., Tensor]:
    if isinstance(loss, (str, LossSpec)):
        return create_loss(loss, label_smoothing=label_smoothing)
    if inspect.isclass(loss) and issubclass(loss, nn.Module):
        return loss()
    if callable(loss) and not inspect.isclass(loss):
        return loss
    raise TypeError(f"loss must be a spec, a criterion, its class or a callable, got {loss!r}")


def _with_sum(criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the criterion with a sum for its reduction, or itself where it has no such option."""
    if isinstance(criterion, nn.Module):
        if not isinstance(getattr(criterion, "reduction", None), str):
            return criterion
        summed: Any = copy.copy(criterion)
        summed.reduction = "sum"
        return summed  # type: ignore[no-any-return]
    try:
        takes = "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        takes = False
    if not takes:
        return criterion

    def summed_function(logits: Tensor, target: Tensor) -> Tensor:
        return criterion(logits, target, reduction="sum")

    return summed_function
