"""Weights of samples and of tokens: a column of the data, or a function of what the model says.

A `loss_weight` column holds a number for each row, or a list with one for each of its tokens (the
label's own place, before any shift). Negative weights unlearn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from rlo_core.errors import DataError
from rlo_core.gates import Gate, RowStatistics
from torch import Tensor

from rlo_hf.tasks import Task, shifted

COLUMN = "loss_weight"
WeightMean = Literal["weights", "tokens"]
"""What the mean divides by: the sum of the weights of the kept labels, or their number."""
Weights = Callable[[Mapping[str, Any], RowStatistics], Tensor]
"""Called with a batch and the statistics of its kept labels in order; returns their weights."""


class WeightCollator:
    """A collator that brings `loss_weight` along with whatever another one makes of the rest.

    Args:
        inner: The collator of the rest, which may pad, pack or lay rows end to end.
    """

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, features: list[Any]) -> Any:
        """Return the batch, with "loss_weight" of shape (B) or that of the labels, if given.

        Raises:
            DataError: a list of weights that is not one for each token, or rows without weights
                among rows with them.
        """
        if not all(isinstance(row, Mapping) for row in features):
            return self.inner(features)
        given = [row.get(COLUMN) for row in features]
        if all(weight is None for weight in given):
            return self.inner(features)
        if any(weight is None for weight in given):
            raise DataError(f"every row must have {COLUMN!r}, or none")
        rest = [{key: row[key] for key in row if key != COLUMN} for row in features]
        lengths = [len(row["input_ids"]) if "input_ids" in row else 0 for row in rest]
        batch = self.inner(rest)
        weights = [torch.as_tensor(weight, dtype=torch.float32) for weight in given]
        labels = batch["labels"]
        if all(weight.dim() == 0 for weight in weights) and len(labels) == len(weights):
            batch[COLUMN] = torch.stack(weights)
            return batch
        targets = [len(row["labels"]) if _long(row.get("labels")) else n
                   for row, n in zip(rest, lengths, strict=True)]  # fmt: skip
        spread = [
            weight.expand(n) if weight.dim() == 0 else weight
            for weight, n in zip(weights, targets, strict=True)
        ]
        for weight, n in zip(spread, targets, strict=True):
            if weight.shape != (n,):
                raise DataError(
                    f"{COLUMN} must be a number or one for each of the row's {n} tokens, got "
                    f"{len(weight)}"
                )
        batch[COLUMN] = _placed(spread, labels, batch)
        return batch


def _long(labels: Any) -> bool:
    return labels is not None and hasattr(labels, "__len__") and getattr(labels, "ndim", 1) > 0


def _placed(spread: list[Tensor], labels: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Lay weights where the collator laid the tokens: end to end in one row, or padded."""
    if len(labels) == 1 and len(spread) > 1:
        spread = [torch.cat(spread)]
    placed = torch.zeros(labels.shape, dtype=torch.float32)
    mask = batch.get("attention_mask")
    for i, weight in enumerate(spread):
        row = weight[: labels.shape[1]]  # what was cut off is cut off
        left = mask is not None and mask.shape == labels.shape and not bool(mask[i, 0])
        if left:
            placed[i, -len(row) :] = row
        else:
            placed[i, : len(row)] = row
    return placed


def has_weights(dataset: Any) -> bool:
    """Tell whether rows of a data set may have the column; one that cannot be looked at may."""
    if dataset is None:
        return False
    if isinstance(dataset, Mapping):
        return any(has_weights(part) for part in dataset.values())
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        return COLUMN in columns
    if isinstance(dataset, list):
        return bool(dataset) and isinstance(dataset[0], Mapping) and COLUMN in dataset[0]
    return True


def aligned_weights(
    inputs: Mapping[str, Any], target: Tensor, task: Task, *, prompted: bool = False
) -> Tensor | None:
    """Return the weight of each prediction, the shape of `target`, or None without the column.

    Args:
        inputs: The batch.
        target: Labels in the places of the predictions.
        task: Causal weights are shifted as labels are.
        prompted: As `rlo_hf.conventions.aligned`.
    """
    weights = inputs.get(COLUMN)
    if weights is None:
        return None
    weights = weights.to(target.device)
    if weights.dim() < target.dim():
        weights = weights.reshape(-1, *[1] * (target.dim() - 1)).expand(target.shape)
    elif task == "causal" and "shift_labels" not in inputs:
        if prompted:
            weights = torch.nn.functional.pad(weights, (0, 1))
        else:
            weights = shifted(weights)
            weights[..., -1] = 0.0
    if weights.shape != target.shape:
        raise DataError(
            f"{COLUMN} must have the shape of the labels, {tuple(target.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    return weights


class CallableGate(Gate):
    """A user's `weights=` function as a gate of the batch at hand."""

    formula = "weights(batch, rows)"
    source = "the caller"
    needs = ("entropy", "top1")
    whole = True

    def __init__(self, function: Weights) -> None:
        self.function = function
        self.batch: Mapping[str, Any] | None = None

    def factor(self, rows: RowStatistics) -> Tensor:
        """Return the weights of the kept labels; ones outside training."""
        if self.batch is None:
            return torch.ones_like(rows.ce)
        weights = self.function(self.batch, rows)
        if not isinstance(weights, Tensor) or weights.shape != rows.ce.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise DataError(
                f"weights must return one number for each of the {len(rows.ce)} kept labels, got "
                f"{got}"
            )
        return weights.to(rows.ce)
