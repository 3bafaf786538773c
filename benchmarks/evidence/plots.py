"""Draw the plots of docs/evidence.md from the results files.

    python benchmarks/evidence/plots.py

Writes docs/evidence/*.svg; a plot whose results are not there is left as it is.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rlo_core.files import atomic_path
from rlo_core.linear_model.root import Root
from runner import ROOT
from tables import chosen, model_order, records

FOLDER = ROOT / "docs" / "evidence"
STYLE = {
    "svg.hashsalt": "rlo",  # the same numbers give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
SHOWN = ("ce", "rlo:k=3", "rlo-convex:k=3", "gce", "focal", "poly1")


def family() -> Figure | None:
    """The slope of each link: how much a sample counts, by the probability of its label."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    p = np.geomspace(1e-3, 1.0, 400)
    curves = [("rlo k=1 (the gradient of dft)", 1.0, "bounded")]
    curves += [(f"rlo k={k}", float(k), "bounded") for k in (3, 8)]
    curves += [("ce (k = inf)", float("inf"), "convex")]
    curves += [(f"rlo-convex k={k}", float(k), "convex") for k in (8, 3, 2)]
    colours = plt.get_cmap("coolwarm")(np.linspace(0, 1, len(curves)))
    for (label, k, form), colour in zip(curves, colours, strict=True):
        slope = Root(k, None, form).derivatives(-np.log(p))[1]
        width = 2.5 if k == float("inf") else 1.5
        colour = "black" if k == float("inf") else colour
        axis.plot(p, slope, label=label, color=colour, linewidth=width)
    axis.set(xscale="log", yscale="log", xlabel="probability of the label, p", ylim=(1e-3, 40))
    axis.set_ylabel("weight of the sample, link'(ce)")
    axis.legend(fontsize=7.5)
    return figure


def regression() -> Figure | None:
    """Iterations of gradient descent and test accuracy, each against logistic regression."""
    found = records("regression")
    if not found:
        return None
    tables = list(dict.fromkeys(r["table"] for r in found))
    order = model_order(r["model"] for r in found)[1:]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    rows = np.arange(len(order))
    colours = plt.get_cmap("tab10")
    for index, table in enumerate(tables):
        mine = {(r["model"], r["seed"]): r for r in found if r["table"] == table}
        seeds = sorted({seed for _, seed in mine})
        ratios, gaps = [], []
        for model in order:
            pairs = [(mine["lr", s], mine[model, s]) for s in seeds if (model, s) in mine]
            both = [
                (a["iterations"]["gd"], b["iterations"]["gd"])
                for a, b in pairs
                if b.get("iterations", {}).get("gd") and a["iterations"]["gd"]
            ]
            ratios.append(statistics.median(b / a for a, b in both) if both else np.nan)
            scores = [100 * (b["l2"]["accuracy"] - a["l2"]["accuracy"]) for a, b in pairs]
            gaps.append(statistics.fmean(scores) if scores else np.nan)
        shift = (index - len(tables) / 2) * 0.1
        axes[0].plot(ratios, rows + shift, "o", ms=4, color=colours(index), label=table)
        axes[1].plot(gaps, rows + shift, "o", ms=4, color=colours(index))
    axes[0].set(yticks=rows, yticklabels=order, xscale="log")
    axes[0].set_xticks([0.5, 1, 2, 4], labels=["0.5", "1", "2", "4"])
    axes[0].set_xlabel("iterations of gd to 1e-4, relative to LR (median)")
    axes[1].set_xlabel("test accuracy less that of LR, points (mean)")
    for axis, zero in zip(axes, (1.0, 0.0), strict=True):
        axis.axvline(zero, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=7)
    return figure


def vision() -> Figure | None:
    """Test accuracy against the share of wrong training labels."""
    found = [r for r in records("vision_head") if "loss" in r]
    runs = chosen(found, lambda r: r["validation_accuracy"])
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(6, 3.4))
    losses = [loss for loss in dict.fromkeys(r["loss"] for r in runs) if loss in SHOWN]
    noises = sorted({r["noise"] for r in runs})
    for index, loss in enumerate(losses):
        x, y, e = [], [], []
        for place, noise in enumerate(noises):
            cell = [r for r in runs if r["loss"] == loss and r["noise"] == noise]
            scores = [100 * r["test"]["accuracy"] for r in cell]
            if scores:
                x.append(place + (index - len(losses) / 2) * 0.1)
                y.append(statistics.fmean(scores))
                e.append(statistics.stdev(scores) if len(scores) > 1 else 0.0)
        axis.errorbar(x, y, e, fmt="o", capsize=3, label=loss)
    axis.set_xticks(range(len(noises)), labels=[f"{100 * n:.0f} %" for n in noises])
    axis.set(xlabel="wrong training labels", ylabel="test accuracy, %")
    axis.legend(fontsize=8)
    return figure


def language() -> Figure | None:
    """Finetuning: perplexity of the new text against perplexity of the old one.

    What is ten times as high as ce would hide the rest: it is named in the legend instead.
    """
    found = [r for r in records("language") if r["job"] == "finetune-stories260k"]
    if not found:
        return None
    by: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in chosen([r for r in found if r["loss"]], lambda r: -r["perplexity"]["validation"]):
        by[r["loss"]].append((r["perplexity"]["test"], r["perplexity"]["other"]))
    figure, axis = plt.subplots(figsize=(6, 3.6))
    most = 10 * by["ce"][0][0]
    for label, points in by.items():
        x, y = zip(*points, strict=True)
        if min(x) < most:
            axis.plot(x, y, "o", ms=5, label=label)
        else:
            note = f"{label}: at {statistics.fmean(x):,.0f}, {statistics.fmean(y):,.0f}"
            axis.plot([], [], " ", label=note)
    before = [r["perplexity"]["other"] for r in found if r["loss"] is None]
    note = f" (before: {before[0]:.2f})" if before else ""
    axis.set(xlabel="held-out perplexity, Shakespeare", ylabel=f"perplexity, TinyStories{note}")
    axis.legend(fontsize=8)
    return figure


def quantization() -> Figure | None:
    """Degradation of the models finetuned with each loss, for every setting."""
    found = [r for r in records("quantization") if r["loss"]]
    losses = list(dict.fromkeys(r["loss"] for r in found))
    if len(losses) < 2:
        return None
    bits = sorted({r["bits"] for r in found})
    figure, axes = plt.subplots(1, len(bits), figsize=(10, 4.8))
    for axis, width in zip(np.atleast_1d(axes), bits, strict=True):
        mine = [r for r in found if r["bits"] == width]
        names = list(dict.fromkeys((r["method"], r["incoherence"]) for r in mine))
        for index, loss in enumerate(losses):
            means, errors = [], []
            for name in names:
                values = [
                    r["degradation"]
                    for r in mine
                    if r["loss"] == loss and (r["method"], r["incoherence"]) == name
                ]
                means.append(statistics.fmean(values) if values else np.nan)
                errors.append(statistics.stdev(values) if len(values) > 1 else 0.0)
            at = np.arange(len(names)) + (index - (len(losses) - 1) / 2) * 0.8 / len(losses)
            axis.errorbar(means, at, xerr=errors, fmt="o", ms=4, capsize=2, label=loss)
        labels = [f"{m}{' + incoh.' if i != 'none' else ''}" for m, i in names]
        axis.set_yticks(range(len(names)), labels=labels, fontsize=7)
        axis.set(title=f"{width} bits", xlabel="degradation, nats")
        axis.axvline(0, color="grey", linewidth=0.8)
    np.atleast_1d(axes)[0].legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[], Figure | None]] = {
    "family": family,
    "regression": regression,
    "vision": vision,
    "language": language,
    "quantization": quantization,
}


@click.command()
def main() -> None:
    """Write docs/evidence/*.svg."""
    with mpl.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw()
            if figure is None:
                click.echo(f"{name}: no results", err=True)
                continue
            with atomic_path(Path(FOLDER) / f"{name}.svg") as temporary:
                figure.savefig(temporary, format="svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
