"""From runs to a verdict: paired differences to ce with intervals, a choice, the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rlo_core.compare.measures import criterion_value
from rlo_core.compare.search import BASE, SearchOptions, best_rates, noise_share
from rlo_core.compare.study import Config, Runs
from rlo_core.compare.task import CompareError, Task

LEVEL = 0.95
HIGHER_IS_BETTER = frozenset({"accuracy"})
WORDS = {
    "accuracy": "accuracy",
    "ce": "cross entropy",
    "ece": "calibration error",
    "ece_scaled": "calibration error after temperature scaling",
}
UNSEEN = "no difference that this budget can see"


@dataclass(frozen=True)
class Difference:
    """A loss less ce on one metric, over the seeds that both have.

    Attributes:
        loss: The loss.
        metric: The metric, or a criterion's name.
        seeds: How many seeds both have.
        base: ce's mean.
        mean: The mean difference.
        low: Lower end of the interval.
        high: Upper end.
    """

    loss: str
    metric: str
    seeds: int
    base: float
    mean: float
    low: float
    high: float

    @property
    def seen(self) -> int:
        """1 where the loss is better than ce, -1 where it is worse, 0 where neither was seen."""
        sign = 1 if self.metric in HIGHER_IS_BETTER else -1
        if self.low > 0:
            return sign
        return -sign if self.high < 0 else 0


def interval(
    differences: list[float], *, overlap: float = 0.0, level: float = LEVEL
) -> tuple[float, float]:
    """Return a t interval of the mean of paired differences.

    The variance of the mean is s^2 (1/n + overlap): with splits of one data set that overlap,
    overlap is held-out over training samples (Nadeau and Bengio, 2003); 0 is the plain interval.

    Raises:
        ValueError: fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"an interval needs two differences or more, got {n}")
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, n - 1)) * stdev(differences)
    half *= math.sqrt(1 / n + overlap)
    mean = fmean(differences)
    return mean - half, mean + half


def wilson(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share of n."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + level / 2))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run on samples with trusted labels, if there are any."""
    found: dict[str, Any] = record.get("trusted") or record
    return found


def differences_of(
    runs: Runs, compared: list[Config], base: Config, task: Task, criterion: str
) -> list[Difference]:
    """Return every compared loss's differences to ce, on the criterion and on every metric.

    Each interval is at 1 - 5 % / (number of compared losses): together they hold with 95 %.
    """
    noise = noise_share(runs)
    level = 1 - (1 - LEVEL) / max(1, len(compared))
    found = []
    for config in compared:
        seeds = sorted(set(runs[config]) & set(runs[base]))
        for metric in (criterion, *task.metrics):
            pairs = []
            for seed in seeds:
                if metric == criterion and metric not in task.metrics:
                    a, b = (
                        criterion_value(runs[c][seed], criterion, noise) for c in (base, config)
                    )
                else:
                    a, b = (figures(runs[c][seed])[metric] for c in (base, config))
                pairs.append((a, b))
            gaps = [b - a for a, b in pairs]
            low, high = interval(gaps, overlap=task.overlap, level=level)
            mean_base = fmean(a for a, _ in pairs)
            found.append(
                Difference(config[0], metric, len(seeds), mean_base, fmean(gaps), low, high)
            )
    return found


def verdict_of(runs: Runs, task: Task, options: SearchOptions) -> dict[str, Any]:
    """Return the verdict, JSON values only.

    `best` is the loss of the lowest criterion; `choice` is the same where its criterion was seen to
    be lower than ce's and its accuracy was not seen to be lower, and ce otherwise.

    Raises:
        CompareError: no loss has two seeds together with ce.
    """
    criterion = options.criterion
    best = best_rates(runs, criterion)
    noise = noise_share(runs)
    base = (BASE, best[BASE][0]) if BASE in best else None
    compared = [
        (loss, rate)
        for loss, (rate, _) in best.items()
        if base and loss != BASE and len(set(runs[(loss, rate)]) & set(runs[base])) >= 2
    ]
    if base is None or not compared:
        raise CompareError("no loss has two seeds together with ce; give more --trials")
    found = differences_of(runs, compared, base, task, criterion)
    judged = [d for d in found if d.metric == criterion and criterion not in task.metrics]
    judged = judged or [d for d in found if d.metric == criterion]
    sign = -1 if criterion in HIGHER_IS_BETTER else 1
    top = min(judged, key=lambda d: sign * d.mean)
    leads = sign * top.mean < 0
    accuracy = next((d for d in found if (d.loss, d.metric) == (top.loss, "accuracy")), None)
    worse = accuracy is not None and accuracy.seen < 0
    rates = {loss: task.rates[rate] for loss, (rate, _) in best.items()}
    choice = top.loss if top.seen > 0 and not worse else BASE
    rows = [
        _row(loss, rate, runs, task, criterion, noise)
        for loss, (rate, _) in sorted(best.items(), key=lambda item: item[1][1])
    ]
    lost = {loss for loss, _ in runs} - set(best)
    return {
        "criterion": criterion,
        "best": top.loss if leads else BASE,
        "choice": choice,
        "rate": rates[choice],
        "rate_name": task.rate_name,
        "sentences": [
            _sentence(metric, [d for d in found if d.metric == metric]) for metric in task.metrics
        ],
        "summary": _summary(top, choice, worse, rates, task.rate_name),
        "differences": [{**vars(d), "seen": d.seen} for d in found],
        "losses": rows + [{"loss": loss, "diverged": _diverged(runs, loss)} for loss in lost],
        "noise": noise_of(runs[base], runs[(top.loss, best[top.loss][0])]),
        "trusted": any("trusted" in record for record in runs[base].values()),
        "runs": sum(len(seeds) for seeds in runs.values()),
        "full_grid": len(options.losses) * len(task.rates) * options.seeds,
        "diverged": sum(
            bool(record.get("diverged")) for seeds in runs.values() for record in seeds.values()
        ),
        "seconds": round(sum(r["seconds"] for seeds in runs.values() for r in seeds.values()), 3),
        "interval": (
            f"t over {top.seeds} paired seeds, 95 % for all {len(compared)} losses together"
            + (", variance widened for overlapping splits (Nadeau-Bengio)" if task.overlap else "")
        ),
    }


def _diverged(runs: Runs, loss: str) -> int:
    return sum(
        bool(record.get("diverged"))
        for (name, _), seeds in runs.items()
        if name == loss
        for record in seeds.values()
    )


def _row(
    loss: str, rate: int, runs: Runs, task: Task, criterion: str, noise: float
) -> dict[str, Any]:
    records = [r for r in runs[(loss, rate)].values() if not r.get("diverged")]
    means = {
        metric: round(fmean(figures(record)[metric] for record in records), 6)
        for metric in task.metrics
    }
    value = fmean(criterion_value(record, criterion, noise) for record in records)
    return {
        "loss": loss,
        task.rate_name: task.rates[rate],
        "at the end of the grid": rate in (0, len(task.rates) - 1) and len(task.rates) > 1,
        "seeds": len(records),
        "criterion": round(value, 6),
        **means,
        "seconds": round(fmean(record["seconds"] for record in records), 4),
        "diverged": _diverged(runs, loss),
    }


def amount(metric: str, value: float, *, sign: bool = True) -> str:
    """Return a figure in its unit: points of a hundred, or nats."""
    plus = "+" if sign else ""
    if metric == "ce":
        return f"{value:{plus}.4f} nats"
    return f"{100 * value:{plus}.2f} points"


def _sentence(metric: str, found: list[Difference]) -> str:
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    top = min(found, key=lambda d: sign * d.mean)
    seen = [d for d in found if d.seen > 0]
    if seen:
        top = min(seen, key=lambda d: sign * d.mean)
    size = amount(metric, top.mean)
    unit = size.partition(" ")[2]
    ends = " to ".join(amount(metric, v).partition(" ")[0] for v in (top.low, top.high))
    word = WORDS.get(metric, metric)
    if top.seen > 0:
        return f"{word}: {top.loss} is better than ce by {size} ({ends} {unit})"
    if all(d.seen < 0 for d in found):
        return (
            f"{word}: ce is better than all that were compared; {top.loss} {size} ({ends} {unit})"
        )
    return f"{word}: {UNSEEN}; {top.loss} {size} ({ends} {unit})"


def _summary(
    top: Difference, choice: str, worse: bool, rates: dict[str, float], rate_name: str
) -> str:
    at = f"{choice} at {rate_name} {rates[choice]:g}"
    if choice != BASE:
        return f"use {at}"
    if worse:
        return f"use {at}: {top.loss} leads by the criterion but loses accuracy"
    return f"{UNSEEN}: use {at}"


def noise_of(*groups: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the share of wrong labels as held-out disagreement shows it.

    Returns:
        `rate`, the disagreement of the better group among the more confident half of its samples,
        where a model makes few errors of its own; `low`, the lower end of its interval; `high`, the
        upper end of the interval of the disagreement among all samples, which has the model's own
        errors in it.
    """
    found = []
    for group in groups:
        records = [record for record in group.values() if not record.get("diverged")]
        if records:
            sure = fmean(record["sure_error"] for record in records)
            every = 1 - fmean(record["accuracy"] for record in records)
            found.append((every, sure, records[0]["sure_samples"], records[0]["samples"]))
    every, sure, few, all_ = min(found)
    low, high = wilson(sure, few)[0], wilson(every, all_)[1]
    return {"rate": round(sure, 4), "low": round(low, 4), "high": round(max(high, sure), 4)}
