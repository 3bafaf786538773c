"""What a validation measures, added up on the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CALIBRATION_BINS = 15


class Measures:
    """Sums over samples: cross entropy, the objective, top-1, top-5, calibration in 15 bins.

    `update` reads nothing back, so that a GPU is not waited for; `result` reads once. Sums of
    several devices add up (`sums` is one tensor), so each sample counts once whatever its batch.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5 + 3 * CALIBRATION_BINS, dtype=dtype, device=device)

    def update(self, logits: Tensor, labels: Tensor, objective: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (N, C), float32.
            labels: (N,), class numbers.
            objective: The mean objective of the batch.
        """
        count = len(labels)
        log_p = logits.log_softmax(-1)
        confidence, guess = log_p.max(-1)
        confidence = confidence.exp().to(self.sums.dtype)
        right = (guess == labels).to(self.sums.dtype)
        top5 = logits.topk(min(5, logits.shape[-1])).indices.eq(labels[:, None]).any(-1)
        plain = torch.stack(
            [
                torch.ones((), device=logits.device) * count,
                F.nll_loss(log_p, labels, reduction="sum"),
                objective.float() * count,
                right.sum(),
                top5.sum(),
            ]
        )
        # Bin b is (b/15, (b+1)/15].
        bins = (confidence * CALIBRATION_BINS).ceil().long().sub_(1)
        bins.clamp_(0, CALIBRATION_BINS - 1)
        added = torch.zeros(3, CALIBRATION_BINS, dtype=self.sums.dtype, device=logits.device)
        rows = torch.stack([torch.ones_like(right), confidence, right])
        added.scatter_add_(1, bins.expand(3, -1), rows)
        self.sums += torch.cat([plain.to(self.sums.dtype), added.flatten()])

    def result(self) -> dict[str, float]:
        """Return `loss`, `ce`, `acc1`, `acc5` and `ece`, means over the samples."""
        sums = self.sums.double().cpu()
        count = max(1.0, float(sums[0]))
        ce, loss, acc1, acc5 = (float(value) / count for value in sums[1:5])
        _, confidence, right = sums[5:].view(3, CALIBRATION_BINS)
        ece = float((confidence - right).abs().sum()) / count
        return {"loss": loss, "ce": ce, "acc1": acc1, "acc5": acc5, "ece": ece}
