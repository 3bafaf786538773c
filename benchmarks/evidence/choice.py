"""Evidence on choosing a loss without clean labels: full grids of loss, rate and seed.

    python benchmarks/evidence/choice.py benchmarks/evidence/configs/choice.yaml [--group heads]

Each run is measured twice with `rlo_core.compare.measures.Held`: on held-out samples that have the
given, partly wrong labels (all that a user has) and on test samples with clean ones. `heads` trains
a network of one hidden layer on the fixed features of a pretrained ResNet-20 with human, even and
pairwise wrong labels of CIFAR-10; `news` a linear model of TF-IDF with labels that rules made;
`tables` linear models of small tables where class 1 is called 0 more often than the other way
round; `boosting` LightGBM on tables with evenly wrong labels. `choice_tables.py` reads the file.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from choice_data import Split, heads, news, tables
from rlo_core.compare.measures import Held
from rlo_core.linear_model import RootedLogisticRegression
from rlo_core.registry import create_loss, parse_spec
from rlo_core.robust import ELRLoss
from runner import RESULTS, ROOT, Results, load_config
from torch import Tensor, nn

CACHE = ROOT / "build" / "choice"
Run = Callable[[Split, str, float, int, dict[str, Any]], tuple[Tensor, Tensor, float]]


def head(
    split: Split, loss: str, rate: float, seed: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Train the head with AdamW and one cycle; return logits of held-out and test samples."""
    torch.manual_seed(seed)
    x, y = split.train
    net = nn.Sequential(
        nn.Linear(x.shape[1], config["width"]), nn.ReLU(), nn.Linear(config["width"], 10)
    )
    state = ELRLoss(len(x), 10) if loss == "elr" else None
    criterion = None if state is not None else create_loss(loss)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0, fused=True)
    batch, steps = config["batch"], config["epochs"] * (len(x) // config["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(config["epochs"]):
        order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch]
        for index in order.split(batch):
            logits = net(x[index])
            value = state(logits, y[index], index) if state else criterion(logits, y[index])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        return net(split.held[0]), net(split.test[0]), seconds


def linear(
    split: Split, loss: str, rate: float, seed: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Fit `RootedLogisticRegression` with C = rate."""
    spec = parse_spec(loss)
    k = float(spec.options.get("k", "inf"))
    form = "convex" if spec.name == "rlo-convex" else "bounded"
    model = RootedLogisticRegression(k=k, form=form, C=rate, max_iter=300)
    start = time.process_time()
    model.fit(split.train[0], split.train[1])
    seconds = time.process_time() - start
    held, test = (
        torch.tensor(model.predict_log_proba(part[0])) for part in (split.held, split.test)
    )
    return held.float(), test.float(), seconds


def boosted(
    split: Split, loss: str, rate: float, seed: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Boost LightGBM's trees with learning rate = rate."""
    from rlo_core.boosting_estimators import RootedLGBMClassifier

    model = RootedLGBMClassifier(
        loss, n_estimators=config["trees"], learning_rate=rate, num_leaves=15, n_jobs=1,
        random_state=seed, verbose=-1,
    )  # fmt: skip
    start = time.process_time()
    model.fit(split.train[0], split.train[1])
    seconds = time.process_time() - start
    held, test = (
        torch.tensor(np.log(np.maximum(model.predict_proba(part[0]), 1e-30)))
        for part in (split.held, split.test)
    )
    return held.float(), test.float(), seconds


def measured(logits: Tensor, labels: Any) -> dict[str, Any]:
    held = Held()
    held.update(logits, torch.as_tensor(labels).long())
    found = held.result()
    for name in ("bins", "bins_scaled"):  # curves of two thousand runs are of no use
        del found[name]
    return {
        name: [round(v, 5) for v in value] if isinstance(value, list) else round(value, 6)
        for name, value in found.items()
    }


RUNS: dict[str, Run] = {"heads": head, "news": linear, "tables": linear, "boosting": boosted}


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "evidence_choice.jsonl")
@click.option("--group", multiple=True, help="Only these groups.")
@click.option("--cell", "only", multiple=True, help="Only these cells.")
@click.option("--tuned", is_flag=True, help="Later seeds at each loss's best rate only, by `miss`.")
@click.option(
    "--minutes", type=float, default=1e9, help="Stop after this much time; goes on later."
)
def main(
    config: Path,
    out: Path,
    group: tuple[str, ...],
    only: tuple[str, ...],
    tuned: bool,
    minutes: float,
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*stopped after.*")
    settings = load_config(config)
    results = Results(out, settings)
    end = time.monotonic() + 60 * minutes
    for seed in settings["seeds"]:
        for name in group or settings["groups"]:
            options = settings[name]
            for cell, splits in {"heads": heads, "news": news}.get(name, tables)(name, options):
                if only and cell not in only:
                    continue
                for loss in options["losses"]:
                    rates = options["rates"]
                    if tuned and seed != settings["seeds"][0]:
                        rates = [best_rate(results, f"{name}/{cell}/{loss}", rates, settings)]
                    for rate in rates:
                        key = f"{name}/{cell}/{loss}/rate={rate:g}/seed={seed}"
                        if key in results.records:
                            continue
                        if time.monotonic() > end:
                            click.echo("out of time; start again to go on", err=True)
                            return
                        results.measure(
                            key,
                            lambda: one(name, cell, splits, loss, rate, seed, options),  # noqa: B023
                        )


def best_rate(results: Results, stem: str, rates: list[float], settings: dict[str, Any]) -> float:
    """Return the rate of the lowest `miss` on held-out samples with the first seed."""
    first = settings["seeds"][0]
    return min(
        rates,
        key=lambda rate: results.records[f"{stem}/rate={rate:g}/seed={first}"]["held"]["miss"],
    )


def one(
    group: str,
    cell: str,
    splits: Callable[[int], Split],
    loss: str,
    rate: float,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train once and return the record; guesses on shared held-out samples are kept for later."""
    split = splits(seed)
    held, test, seconds = RUNS[group](split, loss, rate, seed, options)
    agreement = None
    if split.held_is_fixed:
        CACHE.mkdir(parents=True, exist_ok=True)
        stem = f"{group}-{cell}-{loss}-{rate:g}".replace(":", "_")
        guesses = held.argmax(1).numpy().astype(np.uint8)
        past = [np.load(CACHE / f"{stem}-{s}.npy") for s in range(seed)]
        np.save(CACHE / f"{stem}-{seed}.npy", guesses)
        same = [float((guesses == g).mean()) for g in past]
        agreement = round(float(np.mean(same)), 5) if same else None
    return {
        "group": group,
        "cell": cell,
        "loss": loss,
        "rate": rate,
        "seed": seed,
        "seconds": round(seconds, 4),
        "wrong": round(split.wrong, 4),
        "agreement": agreement,
        "held": measured(held, split.held[1]),
        "test": measured(test, split.test[1]),
    }


if __name__ == "__main__":
    main()
