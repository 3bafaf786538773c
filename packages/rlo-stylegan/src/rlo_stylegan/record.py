"""A GAN run as the suite knows runs: `run.json` and `metrics.jsonl` from what the checkout wrote.

A training loop of these families writes `training_options.json`, a line of `stats.jsonl` each tick
and a line of `metric-NAME.jsonl` each snapshot. Losses of different objectives are not comparable,
so the cross entropy of the three terms stands beside them: under `ce` it is the loss itself, else
`GanLoss` has reported it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlo_core.errors import RunError
from rlo_core.runs.record import Run, parse_object, read_lines, read_utf8

from rlo_stylegan.checkout import Checkout

_STATISTICS = {
    "Loss/G/loss": "loss_G",
    "Loss/D/loss": "loss_D",
    "Loss/ce/G": "ce_G",
    "Loss/slope/G": "slope_G",
    "Loss/slope/D_fake": "slope_D_fake",
    "Loss/slope/D_real": "slope_D_real",
    "Loss/scores/fake": "score_fake",
    "Loss/scores/real": "score_real",
    "Loss/signs/real": "sign_real",
    "Loss/r1_penalty": "r1_penalty",
    "Loss/pl_penalty": "path_length_penalty",
    "Progress/augment": "augment",
}
_LOWER_IS_BETTER = ("fid", "kid", "ppl")
_CE_D = ("Loss/ce/D_fake", "Loss/ce/D_real")


def read_options(folder: Path) -> dict[str, Any]:
    """Return `training_options.json` of a run.

    Raises:
        RunError: it is not there, or is not a JSON object.
    """
    path = folder / "training_options.json"
    try:
        options = parse_object(read_utf8(path), repr(str(path)))
    except FileNotFoundError:
        raise RunError(f"no GAN run in {str(folder)!r}: {path.name} is not there") from None
    for name in ("loss_kwargs", "training_set_kwargs"):
        if not isinstance(options.get(name, {}), dict):
            raise RunError(f"{str(path)!r}: {name} must be an object")
    return options


def loss_of(options: dict[str, Any]) -> str:
    """Return the spec of a run; one of an unpatched checkout is `ce`."""
    return str(options.get("loss_kwargs", {}).get("gan_loss", "ce"))


def _mean(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if not isinstance(value, dict) or not value.get("num"):
        return None
    return _finite(value.get("mean"))


def _finite(value: Any) -> float | None:
    """Return a measured number as a float; None for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def tick_records(folder: Path, loss: str) -> Iterator[dict[str, float | str]]:
    """Yield what `stats.jsonl` measured, one record for each tick, under short names."""
    path = folder / "stats.jsonl"
    if not path.is_file():
        return
    for line in read_lines(path):
        kimg = _mean(line, "Progress/kimg")
        if kimg is None:
            continue
        record: dict[str, float | str] = {"kimg": kimg}
        for key, name in _STATISTICS.items():
            value = _mean(line, key)
            if value is not None:
                record[name] = value
        parts = [_mean(line, key) for key in _CE_D]
        if parts[0] is not None and parts[1] is not None:
            record["ce_D"] = parts[0] + parts[1]
        if loss == "ce":  # the cross entropy is the loss
            record |= {
                f"ce_{net}": record[f"loss_{net}"] for net in "GD" if f"loss_{net}" in record
            }
        yield record


def metric_records(folder: Path) -> Iterator[dict[str, float | str]]:
    """Yield what every `metric-NAME.jsonl` measured: one record for each snapshot and number."""
    for path in sorted(folder.glob("metric-*.jsonl")):
        for line in read_lines(path):
            found = re.search(r"(\d+)", Path(str(line.get("snapshot_pkl") or "")).stem)
            if found is None:  # a pickle from elsewhere has no place on the axis
                continue
            results = line.get("results")
            for name, value in results.items() if isinstance(results, dict) else ():
                number = _finite(value)
                if number is not None:
                    yield {"kimg": float(found[1]), name: number}


def write_record(
    run: Path, folder: Path, *, checkout: Checkout | None = None, status: str = "done"
) -> dict[str, Any]:
    """Write `run.json` and `metrics.jsonl` of a GAN run; return the summary.

    Args:
        run: The folder that the training loop wrote.
        folder: Where the two files go; may be the same.
        checkout: What trained it, for the record.
        status: How it ended.

    Raises:
        RunError: it is no GAN run.
    """
    options = read_options(run)
    loss = loss_of(options)
    data = options.get("training_set_kwargs", {})
    ticks = list(tick_records(run, loss))
    metrics = list(metric_records(run))
    record = Run.create(
        folder,
        kind="stylegan train",
        loss=loss,
        options=options | ({"family": checkout.family()} if checkout else {}),
        seed=options.get("random_seed"),
        data={key: data.get(key) for key in ("path", "resolution", "max_size")},
    )
    for line in [*ticks, *metrics]:
        record.log(**line)
    summary: dict[str, Any] = dict(ticks[-1]) if ticks else {}
    for line in metrics:
        for name, value in line.items():
            if name != "kimg" and isinstance(value, float):
                summary[name] = value
                better = min if name.startswith(_LOWER_IS_BETTER) else max
                summary[f"best {name}"] = better(summary.get(f"best {name}", value), value)
    record.finish(status=status, **summary)
    return {"run": run.name, "loss": loss, **summary}
