"""Write the tables of docs/evidence.md from the results files, between its markers.

    python benchmarks/evidence/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; text outside is left alone. A
table whose results are not there says so.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import choice_tables
import click
from rlo_core.files import write_text
from runner import RESULTS, ROOT, load_results

DOCUMENT = ROOT / "docs" / "evidence.md"
Records = list[dict[str, Any]]


def records(name: str) -> Records:
    """Return the records of one results file, none if it is not there."""
    path = RESULTS / f"evidence_{name}.jsonl"
    return load_results(path)[1] if path.exists() else []


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Iterable[float], digits: int = 1, factor: float = 1.0) -> str:
    """Return mean and standard deviation over seeds."""
    scaled = [v * factor for v in values]
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.{digits}f}"


def difference(pairs: list[tuple[float, float]], digits: int = 1, factor: float = 1.0) -> str:
    """Return the mean of b - a over three pairs or more, bold from two standard errors on."""
    gaps = [(b - a) * factor for a, b in pairs]
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    sure = len(gaps) > 2 and abs(mean) > 2 * error and abs(mean) >= 0.5 * 10**-digits
    return f"**{text}**" if sure else text


def model_order(labels: Iterable[str]) -> list[str]:
    found = set(labels)
    form = [f"{f}/k={k}" for f in ("convex", "bounded") for k in (2, 3, 5, 8, 20)]
    return [label for label in ["lr", *form] if label in found]


def regression(part: str, metric: str, factor: float, digits: int) -> str:
    """A row per table: LR as it is, and each rooted model's paired difference from it."""
    by: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records("regression"):
        by[r["table"]][r["model"]][r["seed"]] = r[part][metric]
    order = model_order(label for table in by.values() for label in table)
    rows = [["table (splits)", *["LR" if m == "lr" else m for m in order]]]
    for table, models in by.items():
        base = models["lr"]
        row = [f"{table} ({len(base)})", spread(base.values(), digits, factor)]
        for label in order[1:]:
            pairs = [(base[s], v) for s, v in models[label].items() if s in base]
            row.append(difference(pairs, digits, factor) if pairs else "")
        rows.append(row)
    return markdown(rows)


def regression_iterations() -> str:
    by: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records("regression"):
        for solver, count in r.get("iterations", {}).items():
            by[r["table"], solver][r["model"]].append(math.inf if count is None else count)
    order = model_order(label for cell in by.values() for label in cell)
    rows = [["table, solver", *["LR" if m == "lr" else m for m in order]]]
    for (table, solver), models in by.items():
        medians = [statistics.median(models[m]) if models[m] else math.nan for m in order]
        shown = ["never" if math.isinf(v) else f"{v:.0f}" for v in medians]
        rows.append([f"{table}, {solver}", *shown])
    return markdown(rows)


def regression_condition() -> str:
    by: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    negative: dict[tuple[str, str], int] = defaultdict(int)
    for r in records("regression"):
        for at, value in r.get("conditions", {}).items():
            by[r["table"], r["model"]][at].append(value["condition"])
            negative[r["table"], at] += value["negative"] > 0 and r["model"] != "lr"
    models = ["lr", "convex/k=3", "convex/k=8", "bounded/k=3", "bounded/k=8"]
    points = ["0", "3", "10", "30", "end"]
    rows = [["table, model", *[f"iteration {p}" if p != "end" else "optimum" for p in points]]]
    for table in dict.fromkeys(t for t, _ in by):
        for model in models:
            cells = by.get((table, model), {})
            means = [statistics.geometric_mean(cells[p]) if p in cells else 0.0 for p in points]
            rows.append(
                [f"{table}, {'LR' if model == 'lr' else model}", *(f"{v:.3g}" for v in means)]
            )
    return markdown(rows)


def regression_speed() -> str:
    path = RESULTS / "regression.jsonl"
    found = load_results(path)[1] if path.exists() else []
    models = list(dict.fromkeys(r["model"] for r in found))
    rows = [["table", *models]]
    for table in dict.fromkeys(r["table"] for r in found):
        cells = {r["model"]: r for r in found if r["table"] == table}
        row = [table]
        for model in models:
            seconds, count = cells[model]["seconds"]["median"], cells[model]["iterations"]
            row.append(f"{1000 * seconds:.0f} ms, x{cells[model]['ratio']:.2f}, {count} it.")
        rows.append(row)
    return markdown(rows)


def chosen(found: Records, better: Callable[[dict[str, Any]], float]) -> Records:
    """Return, of each group of runs, those at the learning rate that its first seed was best at."""
    groups: dict[tuple[Any, ...], Records] = defaultdict(list)
    for r in found:
        groups[r.get("model"), r.get("job"), r.get("noise"), r["loss"]].append(r)
    kept: Records = []
    for group in groups.values():
        first = [r for r in group if r["seed"] == 0]
        lr = max(first, key=better)["lr"]
        kept += [r for r in group if r["lr"] == lr]
    return kept


def vision(model: str, file: str = "vision") -> str:
    found = [r for r in records(file) if r.get("model") == model and "loss" in r]
    runs = chosen(found, lambda r: r["validation_accuracy"])
    noises = sorted({r["noise"] for r in runs})
    rows = [
        ["loss"]
        + [f"{100 * n:.0f} % noise: {w}" for n in noises for w in ("accuracy", "ECE", "lr")]
    ]
    rows[0] += ["epochs to target, clean"]
    for loss in dict.fromkeys(r["loss"] for r in runs):
        row = [f"`{loss}`"]
        for noise in noises:
            cell = [r for r in runs if r["loss"] == loss and r["noise"] == noise]
            if not cell:
                row += ["", "", ""]
                continue
            accuracy = [r["test"]["accuracy"] for r in cell]
            row.append(spread(accuracy, 1, 100) + ("" if len(cell) > 1 else " (1 seed)"))
            row.append(spread([r["test"]["ece"] for r in cell], 1, 100))
            row.append(f"{cell[0]['lr']:g}")
        clean = [r["epochs_to_target"] for r in runs if r["loss"] == loss and r["noise"] == 0]
        row.append("" if not clean else "not in all" if None in clean else spread(clean))
        rows.append(row)
    return markdown(rows)


def vision_cost() -> str:
    rows = [["model", "loss", "ms per step", "ratio to ce"]]
    for r in records("vision") + records("vision_head"):
        for loss, times in r.get("step_seconds", {}).items():
            ratio = times["median"] / r["step_seconds"]["ce"]["median"]
            shown = f"{1000 * times['median']:.1f}"
            rows.append([r["model"], f"`{loss}`", shown, f"{ratio:.3f}"])
    return markdown(rows)


def language(job: str) -> str:
    """A row per loss: perplexities, and the paired difference of their logarithms from ce."""
    found = [r for r in records("language") if r["job"] == job]
    runs = chosen([r for r in found if r["loss"]], lambda r: -r["perplexity"]["validation"])
    splits = {"train": "train", "test": "held out", "other": "other text"}
    splits = {s: shown for s, shown in splits.items() if any(s in r["perplexity"] for r in found)}
    rows = [["loss", "lr", "seeds", *splits.values(), "held out, nats less `ce`"]]
    for r in found:
        if r["loss"] is None:
            rows.append(["before", "", "", *(_perplexity([r], s) for s in splits), ""])
    held_out: dict[str, dict[int, float]] = defaultdict(dict)
    for r in runs:
        held_out[r["loss"]][r["seed"]] = math.log(r["perplexity"]["test"])
    for loss in dict.fromkeys(r["loss"] for r in runs):
        cell = [r for r in runs if r["loss"] == loss]
        pairs = [(held_out["ce"][s], v) for s, v in held_out[loss].items() if s in held_out["ce"]]
        gap = difference(pairs, 3) if pairs and loss != "ce" else ""
        figures = (_perplexity(cell, s) for s in splits)
        rows.append([f"`{loss}`", f"{cell[0]['lr']:g}", str(len(cell)), *figures, gap])
    return markdown(rows)


def _perplexity(cell: Records, split: str) -> str:
    """Return mean and spread; past a million, where a spread says nothing, the range."""
    values = [r["perplexity"][split] for r in cell]
    if max(values) < 1e6:
        return spread(values, 2)
    return " to ".join(f"{v:.0e}" for v in sorted({min(values), max(values)}))


def language_smollm2() -> str:
    """A row per loss: the hf benchmark's finetuning of SmolLM2-135M, one learning rate for all."""
    path = RESULTS / "hf_finetune_smollm2.jsonl"
    found = [r for r in load_results(path)[1] if "perplexity_after" in r] if path.exists() else []
    rows = [["loss", "seeds", "before", "held out"]]
    for loss in dict.fromkeys(r["loss"] for r in found):
        cell = [r for r in found if r["loss"] == loss]
        before, after = (
            spread((r[f"perplexity_{when}"] for r in cell), 2) for when in ("before", "after")
        )
        rows.append([f"`{loss}`", str(len(cell)), before, after])
    return markdown(rows)


def quantization() -> str:
    """A row per setting: perplexities, the control's degradation and the differences from it."""
    found = [r for r in records("quantization") if r["loss"]]
    losses = list(dict.fromkeys(r["loss"] for r in found))
    others = [loss for loss in losses if loss != "ce"]
    by: dict[tuple[int, str, str], dict[str, dict[int, Any]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in found:
        by[r["bits"], r["method"], r["incoherence"]][r["loss"]][r["seed"]] = r
    rows = [["bits, method, incoherence", "seeds", "`ce`", "its degradation"]]
    rows[0] += [head for loss in others for head in (f"`{loss}`", "less `ce`")]
    for (bits, method, incoherence), cell in sorted(by.items(), key=lambda item: item[0][0]):
        seeds = sorted(set.intersection(*(set(cell[loss]) for loss in losses)))
        if not seeds:
            continue
        means = {
            (loss, when): f"{statistics.fmean(cell[loss][s][when] for s in seeds):.2f}"
            for loss in losses
            for when in ("before", "after")
        }
        if len(rows) == 1:
            before = [part for loss in others for part in (means[loss, "before"], "")]
            rows.append(["not quantized", str(len(seeds)), means["ce", "before"], "", *before])
        control = [cell["ce"][s]["degradation"] for s in seeds]
        row = [f"{bits}, {method}, {incoherence}", str(len(seeds)), means["ce", "after"]]
        row.append(spread(control, 3))
        for loss in others:
            theirs = [cell[loss][s]["degradation"] for s in seeds]
            row += [means[loss, "after"], difference(list(zip(control, theirs, strict=True)), 3)]
        rows.append(row)
    return markdown(rows)


def quantization_summary() -> str:
    """A row per number of bits: the difference from ce, averaged over all settings of a seed."""
    found = [r for r in records("quantization") if r["loss"]]
    by: dict[tuple[int, str], dict[int, dict[tuple[str, str], Any]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in found:
        by[r["bits"], r["loss"]][r["seed"]][r["method"], r["incoherence"]] = r
    rows = [["bits, loss", "seeds", "degradation less that of `ce`", "better than `ce` afterwards"]]
    for (bits, loss), seeds in sorted(by.items()):
        control = by[bits, "ce"]
        whole = [s for s in seeds if len(seeds[s]) == len(control.get(s, {}))]
        if loss == "ce" or not whole:
            continue
        means = [
            (
                statistics.fmean(r["degradation"] for r in control[s].values()),
                statistics.fmean(r["degradation"] for r in seeds[s].values()),
            )
            for s in whole
        ]
        pairs = [(control[s][name], r) for s in whole for name, r in seeds[s].items()]
        wins = sum(theirs["after"] > ours["after"] for theirs, ours in pairs)
        cells = [str(len(whole)), difference(means, 3), f"{wins} of {len(pairs)} models"]
        rows.append([f"{bits}, `{loss}`", *cells])
    return markdown(rows)


TABLES: dict[str, Callable[[], str]] = {
    "regression-accuracy": lambda: regression("l2", "accuracy", 100, 1),
    "regression-accuracy-plain": lambda: regression("none", "accuracy", 100, 1),
    "regression-log-loss": lambda: regression("l2", "log_loss", 1, 3),
    "regression-iterations": regression_iterations,
    "regression-condition": regression_condition,
    "vision-resnet18": lambda: vision("resnet18"),
    "regression-speed": regression_speed,
    "vision-head": lambda: vision("head", "vision_head"),
    "vision-vit": lambda: vision("vit"),
    "vision-cost": vision_cost,
    "language-finetune": lambda: language("finetune-stories260k"),
    "language-llama": lambda: language("scratch-llama"),
    "language-opt": lambda: language("scratch-opt"),
    "language-wikitext": lambda: language("scratch-llama-wikitext"),
    "language-smollm2": language_smollm2,
    "quantization-summary": quantization_summary,
    "quantization": quantization,
    "choice-regret": lambda: markdown(choice_tables.regret()),
    "choice-noise": lambda: markdown(choice_tables.noise()),
    "choice-heads": lambda: markdown(choice_tables.losses("heads")),
    "choice-news": lambda: markdown(choice_tables.losses("news")),
    "choice-replay": lambda: markdown(choice_tables.replay()),
}


def fill(text: str) -> str:
    """Return the document with every table between its markers made anew."""

    def table(match: re.Match[str]) -> str:
        body = TABLES[match[1]]()
        if body.count("\n") < 2:
            body = "Not measured."
        return f"<!-- table: {match[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


@click.command()
def main() -> None:
    """Write the tables into docs/evidence.md."""
    write_text(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
