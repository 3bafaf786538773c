"""What a run measured, as curves: records are grouped into panels, panels into lines.

The rule is the same for every host, so that runs of different hosts fit on one page. In a record of
`metrics.jsonl` text is a label (`split="val"`), a number is a measurement, and the first of
`INDEX` that is there is the x axis. A panel is one measurement under one set of labels; a line is
one loss (or, where a run has none, its kind); runs that differ only in their seed are one line with
a band from the lowest to the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlo_core.runs.record import read_metrics, read_run

INDEX = ("epoch", "step", "tokens", "images", "kimg", "tick", "block")
"""Fields that say when a record was taken, best first."""
_NOT_MEASURED = {*INDEX, "seed", "time", "seconds", "k", "m", "lr"}
_NOT_FINITE = {"nan", "inf", "-inf"}


@dataclass
class Line:
    """One loss in one panel: for each seed (or run) its x -> y."""

    name: str
    members: dict[str, dict[float, float]] = field(default_factory=dict)

    def band(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return x, mean, lowest and highest over the members, where all of them have a value."""
        points = list(self.members.values())
        xs = sorted(set.intersection(*(set(member) for member in points)))
        ys = [[member[x] for member in points] for x in xs]
        return xs, [sum(y) / len(y) for y in ys], [min(y) for y in ys], [max(y) for y in ys]


@dataclass
class Panel:
    """One measurement under one set of labels."""

    measure: str
    labels: tuple[str, ...]
    index: str
    lines: dict[str, Line] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The labels and the measurement, e.g. `digits, vit, test: accuracy`."""
        return f"{', '.join(self.labels)}: {self.measure}" if self.labels else self.measure

    @property
    def points(self) -> int:
        """The number of points on the longest curve."""
        return max(len(m) for line in self.lines.values() for m in line.members.values())


def _number(value: Any) -> float | None:
    """Return a measured number, with the text forms of nan and inf that JSON needs, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:  # an integer that no float holds
            return math.inf if value > 0 else -math.inf
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else None


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, str) and value not in _NOT_FINITE and key != "loss"
    }


def read_panels(folders: Sequence[Path]) -> list[Panel]:
    """Return the panels of any number of runs, in the order in which they were first measured.

    Panels in which no line has two points are left out: they are numbers, not curves.

    Raises:
        RunError: a folder holds no run.
    """
    panels: dict[tuple[str, tuple[str, ...], str], Panel] = {}
    taken: dict[tuple[int, str, str], Path] = {}
    for folder in folders:
        run = read_run(folder)
        for record in read_metrics(folder):
            index = next((name for name in INDEX if _number(record.get(name)) is not None), None)
            x = math.nan if index is None else _number(record[index])
            if index is None or x is None or not math.isfinite(x):
                continue
            labels = tuple(_labels(record).values())
            given = record.get("loss")
            loss = (
                given
                if isinstance(given, str)
                else str(run.get("loss") or run.get("kind") or folder.name)
            )
            seed = str(record.get("seed", run.get("seed")))
            for measure, raw in record.items():
                y = _number(raw)
                if y is None or measure in _NOT_MEASURED:
                    continue
                key = (measure, labels, index)
                panel = panels.setdefault(key, Panel(measure, labels, index))
                # A second run with the same loss and seed is another experiment: named apart.
                owner = taken.setdefault((id(panel), loss, seed), folder)
                name = loss if owner == folder else f"{loss} ({folder.name})"
                line = panel.lines.setdefault(name, Line(name))
                line.members.setdefault(seed, {})[x] = y if math.isfinite(y) else math.nan
    return [panel for panel in panels.values() if panel.points > 1]
