"""What `evidence_choice.jsonl` says: regret of each criterion, losses at their rates, replays."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from rlo_core.compare.measures import criterion_value
from rlo_core.compare.search import Search, SearchOptions
from rlo_core.compare.study import open_study
from rlo_core.compare.task import Task
from rlo_core.compare.verdict import interval, verdict_of
from runner import RESULTS, load_results

Cell = dict[tuple[str, float], dict[int, dict[str, Any]]]
CRITERIA = ("symmetric", "accuracy", "likelihood", "forward", "agreement")


@cache
def cells() -> dict[str, tuple[Cell, list[int]]]:
    """Return for each cell its runs and the seeds for which its whole grid was measured."""
    path = RESULTS / "evidence_choice.jsonl"
    if not path.exists():
        return {}
    header, records = load_results(path)
    found: dict[str, Cell] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        found[f"{r['group']}, {r['cell']}"][(r["loss"], r["rate"])][r["seed"]] = r
    whole = {}
    for name, cell in found.items():
        options = header["config"][name.partition(",")[0]]
        grid = [(loss, rate) for loss in options["losses"] for rate in options["rates"]]
        seeds = [s for s in header["config"]["seeds"] if all(s in cell.get(c, {}) for c in grid)]
        if seeds:
            whole[name] = (dict(cell), seeds)
    return whole


def noise_of_ce(cell: Cell, seeds: list[int]) -> float:
    """Return ce's disagreement among its more confident half: what `forward` supposes."""
    return fmean(
        runs[s]["held"]["sure_error"]
        for (loss, _), runs in cell.items()
        if loss == "ce"
        for s in seeds
    )


def judged(cell: Cell, seeds: list[int], criterion: str) -> dict[tuple[str, float], float]:
    """Return by what each loss and rate is judged, lower is better; empty where it cannot be."""
    noise = noise_of_ce(cell, seeds)
    found = {}
    for config, runs in cell.items():
        if criterion == "agreement":
            values = [runs[s]["agreement"] for s in seeds if runs[s]["agreement"] is not None]
            if not values:
                return {}
            found[config] = 1.0 - fmean(values)
        else:
            found[config] = fmean(criterion_value(runs[s]["held"], criterion, noise) for s in seeds)
    return found


def tested(cell: Cell, seeds: list[int], config: tuple[str, float]) -> float:
    return fmean(cell[config][s]["test"]["accuracy"] for s in seeds)


def regret() -> list[list[str]]:
    """A row per cell: the best, and for each criterion what it picks and what that loses."""
    rows = [["cell (seeds)", "wrong labels", "best", "`ce`", *CRITERIA]]
    total: dict[str, list[float]] = defaultdict(list)
    for name, (cell, seeds) in cells().items():
        accuracies = {config: tested(cell, seeds, config) for config in cell}
        top = max(accuracies, key=accuracies.__getitem__)
        own = judged(cell, seeds, "symmetric")
        ce = min((c for c in cell if c[0] == "ce"), key=own.__getitem__)
        wrong = next(iter(cell.values()))[seeds[0]]["wrong"]
        row = [
            f"{name} ({len(seeds)})",
            f"{100 * wrong:.0f} %",
            f"{100 * accuracies[top]:.2f} `{top[0]}`",
            f"{100 * (accuracies[top] - accuracies[ce]):.2f}",
        ]
        total["ce"].append(accuracies[top] - accuracies[ce])
        for criterion in CRITERIA:
            values = judged(cell, seeds, criterion)
            if not values:
                row.append("")
                continue
            pick = min(values, key=values.__getitem__)
            lost = accuracies[top] - accuracies[pick]
            total[criterion].append(lost)
            row.append(f"{100 * lost:.2f} `{pick[0]}`")
        rows.append(row)
    if len(rows) > 1:
        ends = [total["ce"], *(total[criterion] for criterion in CRITERIA)]
        rows.append(["mean", "", "", *(f"**{100 * fmean(v):.2f}**" if v else "" for v in ends)])
        rows.append(["worst", "", "", *(f"{100 * max(v):.2f}" if v else "" for v in ends)])
    return rows


def noise() -> list[list[str]]:
    """A row per cell: the share of wrong labels, and what held-out disagreement says."""
    rows = [["cell", "wrong labels", "estimate", "disagreement of all"]]
    for name, (cell, seeds) in cells().items():
        own = judged(cell, seeds, "symmetric")
        pick = min(own, key=own.__getitem__)
        held = [cell[pick][s]["held"] for s in seeds]
        rows.append(
            [
                name,
                f"{100 * next(iter(cell.values()))[seeds[0]]['wrong']:.1f} %",
                f"{100 * fmean(h['sure_error'] for h in held):.1f} %",
                f"{100 * (1 - fmean(h['accuracy'] for h in held)):.1f} %",
            ]
        )
    return rows


def losses(group: str) -> list[list[str]]:
    """A row per loss: clean accuracy and calibration error in each cell, its rate by `miss`.

    The rate is chosen with the seeds of the whole grid; the figures are over all seeds that ran it.
    """
    shown = {n: c for n, c in cells().items() if n.startswith(f"{group},")}
    rows = [["loss", *(n.partition(", ")[2] for n in shown)]]
    names = dict.fromkeys(loss for cell, _ in shown.values() for loss, _ in cell)
    for loss in names:
        row = [f"`{loss}`"]
        for cell, seeds in shown.values():
            own = judged(cell, seeds, "symmetric")
            config = min((c for c in cell if c[0] == loss), key=own.__getitem__)
            tests = {s: record["test"] for s, record in cell[config].items()}
            base = min((c for c in cell if c[0] == "ce"), key=own.__getitem__)
            gaps = [
                100 * (t["accuracy"] - cell[base][s]["test"]["accuracy"])
                for s, t in tests.items()
                if s in cell[base]
            ]
            text = f"{100 * fmean(t['accuracy'] for t in tests.values()):.1f}"
            if loss != "ce" and len(gaps) > 1:
                low, high = interval(gaps)
                text += f" ({low:+.1f} to {high:+.1f})"
            ece = 100 * fmean(t["ece"] for t in tests.values())
            row.append(f"{text}, ECE {ece:.0f}, {len(tests)}")
        rows.append(row)
    return rows


class Recorded(Task):
    """A cell whose runs are read instead of trained."""

    host: ClassVar[str] = "recorded"

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.rates = tuple(sorted({rate for _, rate in cell}))
        self.default = len(self.rates) // 2

    def describe(self) -> dict[str, Any]:
        return {}

    def check(self, loss: str) -> None: ...

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        return dict(self.cell[(loss, rate)][seed]["held"])

    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        raise NotImplementedError


def replay() -> list[list[str]]:
    """A row per cell of three seeds or more: a search of a quarter of the runs, and the grid."""
    rows = [["cell", "grid", "runs", "grid's best", "search's best", "verdict", "accuracy lost"]]
    for name, (cell, seeds) in cells().items():
        if len(seeds) < 3:
            continue
        names = tuple(dict.fromkeys(loss for loss, _ in cell))
        task = Recorded(cell)
        grid = len(cell) * len(seeds)
        options = SearchOptions(losses=names, seeds=len(seeds), trials=grid // 4)
        full = {
            (loss, task.rates.index(rate)): {
                s: {**r["held"], "seconds": r["seconds"]} for s, r in runs.items() if s in seeds
            }
            for (loss, rate), runs in cell.items()
        }
        expected = verdict_of(full, task, options)
        with tempfile.TemporaryDirectory() as folder:
            setup = {"losses": list(names), "rates": list(task.rates)}
            study = open_study(Path(folder), storage=None, name=name, setup=setup)
            runs = Search(task, study, options, where=folder).run()
        found = verdict_of(runs, task, options)
        same = found["choice"] == expected["choice"]
        lost = _accuracy_of(cell, seeds, expected) - _accuracy_of(cell, seeds, found)
        rows.append(
            [
                name,
                str(grid),
                f"{found['runs']} ({100 * found['runs'] / grid:.0f} %)",
                f"`{expected['best']}`, use `{expected['choice']}`",
                f"`{found['best']}`, use `{found['choice']}`",
                "same" if same else "other",
                f"{100 * lost:+.2f}",
            ]
        )
    return rows


def _accuracy_of(cell: Cell, seeds: list[int], verdict: dict[str, Any]) -> float:
    rate = next(r for r in (verdict["rate"],) if not math.isnan(r))
    return tested(cell, seeds, (verdict["choice"], rate))
