"""The page of a comparison: verdict, paired differences, reliability, rates, cost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlo_core.compare.measures import criterion_value
from rlo_core.compare.search import noise_share
from rlo_core.compare.study import Runs
from rlo_core.compare.task import Task
from rlo_core.compare.verdict import WORDS, figures
from rlo_core.errors import RLOError
from rlo_core.files import write_text
from rlo_core.runs.charts import colours, inline_svg, new_figure
from rlo_core.runs.report import table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_comparison(runs: Runs, verdict: Mapping[str, Any], task: Task, out: Path) -> Path:
    """Write one self-contained page (light and dark, no script, no address); return `out`.

    Raises:
        RLOError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RLOError("a report needs jinja2; pip install 'rlo-core[compare]'") from error
    folder = files("rlo_core.runs").joinpath("report.html.j2").read_text(encoding="utf-8")
    style = re.search(r"<style>.*?</style>", folder, re.DOTALL)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = files("rlo_core.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    compared = list(dict.fromkeys(d["loss"] for d in verdict["differences"]))
    colour = colours(["ce", *compared, *(loss for loss, _ in runs)])
    pictures = [
        *_differences(verdict, colour),
        *_reliability(runs, verdict, task, ["ce", *compared]),
        ("Criterion by rate", rate_chart(runs, verdict, task, colour)),
        ("Seconds of a run", cost_chart(verdict, colour)),
    ]
    page = environment.from_string(text).render(
        title=f"Losses compared: {task.describe().get('data', [task.host])[0]}",
        style=style[0] if style else "",
        verdict=verdict,
        tables=[
            table_of("Losses, each at its best rate", _shown(verdict["losses"])),
            table_of(
                "Less ce, paired by seed",
                [
                    {
                        "loss": d["loss"],
                        "figure": WORDS.get(d["metric"], d["metric"]),
                        "ce": round(d["base"], 5),
                        "difference": round(d["mean"], 5),
                        "from": round(d["low"], 5),
                        "to": round(d["high"], 5),
                        "seen": {1: "better", 0: "", -1: "worse"}[d["seen"]],
                        "seeds": d["seeds"],
                    }
                    for d in verdict["differences"]
                ],
                note=f"Intervals: {verdict['interval']}.",
            ),
        ],
        pictures=[
            {"title": name, "svg": inline_svg(figure, name=f"c{i}", title=name)}
            for i, (name, figure) in enumerate(pictures)
        ],
        document=json.dumps({"task": task.describe(), **verdict}, indent=2),
    )
    write_text(out, page)
    return out


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = {"ece": "calibration error", "ece_scaled": "the same, scaled", "ce": "cross entropy"}
    found = []
    for row in rows:
        shown = {names.get(key, key): value for key, value in row.items()}
        shown["at the end of the grid"] = "yes" if row.get("at the end of the grid") else ""
        found.append(shown)
    return found


def _differences(verdict: Mapping[str, Any], colour: Mapping[str, str]) -> list[tuple[str, Figure]]:
    found = []
    for metric in dict.fromkeys(d["metric"] for d in verdict["differences"]):
        rows = [d for d in verdict["differences"] if d["metric"] == metric]
        figure, (ax,) = new_figure(5.0, 0.8 + 0.42 * len(rows))
        for place, d in enumerate(rows):
            ends = [[d["mean"] - d["low"]], [d["high"] - d["mean"]]]
            ax.errorbar(
                [d["mean"]], [place], xerr=ends, fmt="o", color=colour[d["loss"]], capsize=3
            )
        ax.axvline(0.0, color="#8a7361", linewidth=0.8)
        ax.set_yticks(range(len(rows)), [d["loss"] for d in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel("less ce")
        found.append((f"{WORDS.get(metric, metric)}: paired difference to ce", figure))
    return found


def _reliability(
    runs: Runs, verdict: Mapping[str, Any], task: Task, losses: Sequence[str]
) -> list[tuple[str, Figure]]:
    """Return a diagram for each compared loss: accuracy by confidence, before and after scaling."""
    found = []
    rate_of = {row["loss"]: row.get(task.rate_name) for row in verdict["losses"]}
    for loss in losses:
        if rate_of.get(loss) is None:
            continue
        measured = runs[(loss, task.rates.index(rate_of[loss]))].values()
        records = [figures(r) for r in measured if not r.get("diverged") and "bins" in figures(r)]
        if not records:
            continue
        figure, (ax,) = new_figure(4.0, 3.4)
        ax.plot([0, 1], [0, 1], color="#8a7361", linewidth=0.8)
        for field, label, mark in (("bins", "as trained", "o"), ("bins_scaled", "scaled", "s")):
            x, y = reliability([record[field] for record in records])
            ax.plot(x, y, marker=mark, markersize=3.5, linewidth=1.2, label=label)
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy")
        ax.legend(fontsize=8)
        found.append((f"Reliability: {loss}", figure))
    return found


def reliability(bins: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Return mean confidence and accuracy of the bins that have samples, over all runs."""
    xs, ys = [], []
    for b in range(len(bins[0][0])):
        counts = [run[0][b] for run in bins]
        total = sum(counts)
        if total:
            xs.append(sum(n * run[1][b] for n, run in zip(counts, bins, strict=True)) / total)
            ys.append(sum(n * run[2][b] for n, run in zip(counts, bins, strict=True)) / total)
    return xs, ys


def rate_chart(
    runs: Runs, verdict: Mapping[str, Any], task: Task, colour: Mapping[str, str]
) -> Figure:
    """Draw the criterion of every loss over the grid of rates; diverged runs are left out."""
    noise = noise_share(runs)
    figure, (ax,) = new_figure(5.0, 3.4)
    for loss in dict.fromkeys(loss for loss, _ in runs):
        points = []
        for (name, rate), seeds in sorted(runs.items()):
            kept = [r for r in seeds.values() if not r.get("diverged")]
            if name == loss and kept:
                value = fmean(criterion_value(r, verdict["criterion"], noise) for r in kept)
                points.append((task.rates[rate], value))
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.2,
                    color=colour[loss], label=loss)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel(task.rate_name)
    ax.set_ylabel(f"{verdict['criterion']} criterion, lower is better")
    ax.legend(fontsize=7)
    return figure


def cost_chart(verdict: Mapping[str, Any], colour: Mapping[str, str]) -> Figure:
    """Draw the seconds of a run of each loss at its best rate."""
    rows = [row for row in verdict["losses"] if "seconds" in row]
    figure, (ax,) = new_figure(5.0, 0.8 + 0.28 * len(rows))
    names = [row["loss"] for row in rows]
    ax.barh(names, [row["seconds"] for row in rows], color=[colour[name] for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    return figure
