"""What a trained model does on held-out samples: sums that any host can feed, batch by batch.

Besides accuracy, cross entropy and calibration there are the figures by which a loss is chosen
where labels may be wrong, since all of them use the given labels: the mean of 1 - p of the label
(`miss`), and the likelihood of the label through evenly wrong labels at several rates (`forward`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BINS = 15
TEMPERATURES = tuple(2.0 ** (j / 8) for j in range(-16, 41))
"""From 1/4 to 32, in steps of 9 %: a temperature is looked for among these."""
NOISE_RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
"""Shares of evenly wrong labels at which `forward` is measured."""


class Held:
    r"""Sums over held-out samples, fed with logits and labels.

    Every second sample is in one half and the rest in the other. For the figures "after temperature
    scaling" each half is scaled by the temperature that fits the other one best, so no sample is
    measured with a temperature that has seen it.

    Args:
        temperatures: The temperatures to choose from.

    Example:
        >>> import torch
        >>> held = Held()
        >>> held.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> round(held.result()["accuracy"], 2)
        0.5
    """

    def __init__(self, temperatures: tuple[float, ...] = TEMPERATURES) -> None:
        self.temperatures = temperatures
        count = len(temperatures)
        self.samples = 0
        self.sums = torch.zeros(3, dtype=torch.float64)  # right, ce, 1 - p
        self.forward = torch.zeros(len(NOISE_RATES), dtype=torch.float64)
        self.plain = torch.zeros(3, BINS, dtype=torch.float64)  # samples, confidence, right
        self.halves = torch.zeros(2, dtype=torch.float64)
        self.scaled_ce = torch.zeros(2, count, dtype=torch.float64)
        self.scaled = torch.zeros(2, count, 3, BINS, dtype=torch.float64)
        self.confidence: list[Tensor] = []
        self.right: list[Tensor] = []

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add samples: logits (N, C) and the given labels, (N)."""
        z = logits.detach().float()
        classes = z.shape[1]
        log_p = z.log_softmax(-1)
        own = log_p.gather(1, labels[:, None])[:, 0]
        confidence, guess = log_p.max(-1)
        right = (guess == labels).double().cpu()
        half = (torch.arange(len(labels)) + self.samples) % 2
        self.samples += len(labels)
        p = own.double().exp().cpu()
        ce = -own.double().cpu()
        self.sums += torch.stack([right.sum(), ce.sum(), (1.0 - p).sum()])
        for i, rate in enumerate(NOISE_RATES):
            seen = (1.0 - rate) * p + rate * (1.0 - p) / (classes - 1)
            self.forward[i] += -seen.clamp(min=1e-45).log().sum() if rate else ce.sum()
        self.plain += binned(confidence.exp().double().cpu(), right)
        self.confidence.append(confidence.exp().float().cpu())
        self.right.append(right.bool())
        self.halves += torch.bincount(half, minlength=2).double()
        top = z.max(-1, keepdim=True).values
        shifted = z - top  # the largest is 0, so that no temperature overflows
        own = shifted.gather(1, labels[:, None])[:, 0]
        for j, t in enumerate(self.temperatures):
            total = (shifted / t).exp().sum(-1)
            ce = (total.log() - own / t).double().cpu()
            sure = (1.0 / total).double().cpu()
            self.scaled_ce[:, j].scatter_add_(0, half, ce)
            for h in (0, 1):
                self.scaled[h, j] += binned(sure[half == h], right[half == h])

    def result(self) -> dict[str, Any]:
        """Return the figures, JSON values only.

        Returns:
            `samples`; means over them of `accuracy`, `ce` (nats), `miss` (1 - p of the label);
            `forward`, a list over `NOISE_RATES`, nats; `ece`, the expected calibration error of 15
            bins; `ce_scaled`, `ece_scaled` and `temperature` after temperature scaling; `bins` and
            `bins_scaled`, three lists of 15: samples, mean confidence, accuracy; `sure_error`, the
            disagreement with the labels among the more confident half, and `sure_samples`.
        """
        n = max(self.samples, 1)
        right, ce, miss = (self.sums / n).tolist()
        best = (self.scaled_ce / self.halves.clamp(min=1)[:, None]).argmin(1).tolist()
        swapped = [best[1], best[0]] if self.samples > 1 else best
        scaled = self.scaled[0, swapped[0]] + self.scaled[1, swapped[1]]
        ce_scaled = float(self.scaled_ce[0, swapped[0]] + self.scaled_ce[1, swapped[1]]) / n
        temperature = math.sqrt(self.temperatures[best[0]] * self.temperatures[best[1]])
        confidence, correct = torch.cat(self.confidence), torch.cat(self.right)
        sure = confidence.argsort(descending=True, stable=True)[: max(1, n // 2)]
        return {
            "samples": self.samples,
            "accuracy": right,
            "ce": ce,
            "miss": miss,
            "forward": (self.forward / n).tolist(),
            "ece": calibration_error(self.plain),
            "ce_scaled": ce_scaled,
            "ece_scaled": calibration_error(scaled),
            "temperature": temperature,
            "bins": _means(self.plain),
            "bins_scaled": _means(scaled),
            "sure_error": 1.0 - float(correct[sure].double().mean()),
            "sure_samples": len(sure),
        }


def binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Return samples, confidence and right summed by bin, (3, BINS); bin b is (b, b+1]/15."""
    bins = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
    rows = torch.stack([torch.ones_like(confidence), confidence, right])
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    return sums.scatter_add_(1, bins.expand(3, -1), rows)


def calibration_error(sums: Tensor) -> float:
    """Return the expected calibration error, in [0, 1], of what `binned` returns."""
    return float((sums[1] - sums[2]).abs().sum() / sums[0].sum().clamp(min=1))


def _means(sums: Tensor) -> list[list[float]]:
    count = sums[0].clamp(min=1)
    rows = [sums[0], sums[1] / count, sums[2] / count]
    return [[round(v, 5) for v in row.tolist()] for row in rows]


def criterion_value(record: dict[str, Any], criterion: str, noise_rate: float = 0.0) -> float:
    """Return by what a run is judged, lower is better; inf for one that diverged.

    Args:
        record: What `Held.result` returned.
        criterion: One of `CRITERIA`.
        noise_rate: For "forward", the share of wrong labels.
    """
    if record.get("diverged"):
        return math.inf
    if criterion == "forward":
        at = min(range(len(NOISE_RATES)), key=lambda i: abs(NOISE_RATES[i] - noise_rate))
        value = float(record["forward"][at])
    else:
        value = float(record[_FIELD[criterion]])
        value = 1.0 - value if criterion == "accuracy" else value
    return value if math.isfinite(value) else math.inf


_FIELD = {"symmetric": "miss", "accuracy": "accuracy", "likelihood": "ce"}
CRITERIA = ("symmetric", "accuracy", "likelihood", "forward")
"""`symmetric` is the mean of 1 - p of the label, whose ranking evenly wrong labels leave alone
(Ghosh et al., 2017); `forward` is the likelihood of the label through evenly wrong ones."""
