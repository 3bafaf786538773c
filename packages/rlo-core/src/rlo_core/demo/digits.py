"""The demo's first part: losses on scikit-learn's handwritten digits, with right and wrong labels.

Real data that comes inside a dependency: 1797 images of 8 x 8, a fifth of them held out. First two
small networks under five losses; then a wide one, twice as long, with 40 % of its training labels
wrong.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlo_core.errors import RLOError
from rlo_core.registry import create_loss
from rlo_core.runs.record import Run
from rlo_core.schedules import set_progress

if TYPE_CHECKING:
    from rich.console import Console

LOSSES = ("ce", "focal", "gce", "rlo", "rlo-convex")
SEEDS = (0, 1, 2)
EPOCHS = 20
BATCH = 64
GOAL = 0.95
NOISY_LOSSES = ("ce", "gce", "rlo:k=2")
WRONG = 0.4
CLEAN_TABLE = "Handwritten digits, right labels"
NOISY_TABLE = "Handwritten digits, 40 % of the training labels wrong"


class ConvNet(nn.Sequential):
    """Two convolutions, a pool, a hidden layer: (N, 1, 8, 8) to (N, 10), 38 thousand parameters."""

    learning_rate = 3e-3

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


class TinyViT(nn.Module):
    """A ViT of two layers on 2 x 2 patches: (N, 1, 8, 8) to (N, 10), 18 thousand parameters."""

    learning_rate = 5e-3

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, 10)."""
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


class Perceptron(nn.Sequential):
    """One wide hidden layer, which can learn wrong labels by heart: 19 thousand parameters."""

    learning_rate = 5e-3

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


NETWORKS: dict[str, Callable[[], ConvNet | TinyViT | Perceptron]] = {
    "conv": ConvNet,
    "vit": TinyViT,
    "mlp": Perceptron,
}
CLEAN_NETWORKS = ("conv", "vit")


@dataclass
class _Tally:
    """What the seeds of one network under one loss gave."""

    accuracy: list[float] = field(default_factory=list)
    calibration: list[float] = field(default_factory=list)
    goal: list[int | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    learnt: list[float] = field(default_factory=list)


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images (N, 1, 8, 8) in [0, 1], train labels, test images, test labels.

    Raises:
        RLOError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RLOError("this demo needs scikit-learn; pip install 'rlo-core[demo]'") from error
    images, labels = load(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in split)
    train_x, test_x = (x.float().reshape(-1, 1, 8, 8) / 16.0 for x in (train_x, test_x))
    return train_x, train_y.long(), test_x, test_y.long()


def demo(
    run_dir: Path,
    *,
    console: Console,
    losses: tuple[str, ...] = LOSSES,
    noisy_losses: tuple[str, ...] = NOISY_LOSSES,
    seeds: tuple[int, ...] = SEEDS,
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """Train each network under each loss from each seed; return the table and the totals.

    Args:
        run_dir: Where `run.json` and `metrics.jsonl` go.
        console: Where the progress bar and the table are shown.
        losses: Spec strings; the first is what times are relative to.
        noisy_losses: Those of the trainings with wrong labels; the first is what is compared with.
        seeds: One training each.
        epochs: Of each training; those with wrong labels take twice as many.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    train_x, train_y, test_x, test_y = load_digits()
    noisy = wrong_labels(train_y)
    run = Run.create(
        run_dir,
        kind="demo digits",
        options={"losses": losses, "seeds": seeds, "epochs": epochs, "batch_size": BATCH},
        data={"name": "scikit-learn digits", "train": len(train_x), "test": len(test_x)},
    )
    tallies = {(net, loss, False): _Tally() for net in CLEAN_NETWORKS for loss in losses}
    tallies |= {("mlp", loss, True): _Tally() for loss in noisy_losses}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        rounds = {key: epochs * (2 if key[2] else 1) for key in tallies}
        task = bar.add_task("digits", total=sum(rounds.values()) * len(seeds))
        # Seeds outside, so that a machine that slows down slows all losses alike.
        for seed in seeds:
            for key, tally in tallies.items():
                net, loss, wrong = key
                labels = "40 % wrong labels" if wrong else "right labels"
                bar.update(task, description=f"digits, {net}, {labels}, {loss}")
                scores: list[dict[str, float]] = []
                model: nn.Module = nn.Identity()
                data = (train_x, noisy if wrong else train_y, test_x, test_y)
                for scored, at_work in _train(
                    net, loss, seed, rounds[key], data, tally.step_seconds
                ):
                    model = at_work
                    scores.append(scored)
                    run.log(
                        net=net,
                        labels=labels,
                        loss=loss,
                        seed=seed,
                        epoch=len(scores),
                        split="test",
                        **scored,
                    )
                    bar.advance(task)
                tally.accuracy.append(scores[-1]["accuracy"])
                tally.calibration.append(scores[-1]["calibration error"])
                reached = (i for i, s in enumerate(scores, 1) if s["accuracy"] >= GOAL)
                tally.goal.append(next(reached, None))
                if wrong:
                    tally.learnt.append(_learnt(model, train_x, train_y, noisy))
    clean_rows = [
        _row(net, loss, tally, tallies[net, losses[0], False])
        for (net, loss, wrong), tally in tallies.items()
        if not wrong
    ]
    noisy_rows = [_noisy_row(loss, tally) for (_, loss, wrong), tally in tallies.items() if wrong]
    summary: dict[str, Any] = {
        "trainings": len(tallies) * len(seeds),
        CLEAN_TABLE: clean_rows,
        NOISY_TABLE: noisy_rows,
        "title": "handwritten digits",
        "notes": {CLEAN_TABLE: _clean_note(clean_rows), NOISY_TABLE: _noisy_note(noisy_rows)},
    }
    for heading, rows in ((CLEAN_TABLE, clean_rows), (NOISY_TABLE, noisy_rows)):
        show_table(heading, rows, console, note=summary["notes"][heading])
    run.finish(**summary)
    return summary


def wrong_labels(labels: Tensor, share: float = WRONG) -> Tensor:
    """Return labels of which a share is replaced by one of the nine other digits, always the same.

    Args:
        labels: (N,), int64, each in 0 to 9.
        share: In [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, 10, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + shift) % 10, labels)


def _train(
    net: str,
    loss: str,
    seed: int,
    epochs: int,
    data: tuple[Tensor, ...],
    step_seconds: list[float],
) -> Iterator[tuple[dict[str, float], nn.Module]]:
    """Train one network; yield each epoch's scores and it, and append the time of each step."""
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(seed)
    model, criterion = NETWORKS[net](), create_loss(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=model.learning_rate, weight_decay=0.01)
    steps = epochs * (len(train_x) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, model.learning_rate, total_steps=steps, pct_start=0.2
    )
    done = 0
    for _ in range(epochs):
        model.train()
        for batch in torch.split(torch.randperm(len(train_x)), BATCH):
            if len(batch) < BATCH:
                break
            started = time.perf_counter()
            set_progress(criterion, done / steps)
            optimizer.zero_grad(set_to_none=True)
            criterion(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
            scheduler.step()
            done += 1
            step_seconds.append(time.perf_counter() - started)
        yield _scores(model, test_x, test_y), model


@torch.no_grad()
def _scores(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, cross entropy in nats and expected calibration error over 15 bins."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    model.eval()
    logits = model(images)
    error = multiclass_calibration_error(logits.softmax(1), labels, num_classes=10, n_bins=15)
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "cross entropy": F.cross_entropy(logits, labels).item(),
        "calibration error": error.item(),
    }


@torch.no_grad()
def _learnt(model: nn.Module, images: Tensor, truth: Tensor, given: Tensor) -> float:
    """Return the share of the wrong training labels that the network gives back."""
    wrong = truth != given
    return float((model(images[wrong]).argmax(1) == given[wrong]).double().mean())


def _row(net: str, loss: str, tally: _Tally, reference: _Tally) -> dict[str, Any]:
    reached = [epoch for epoch in tally.goal if epoch is not None]
    # The lowest tenth: what a step costs when nothing else runs on the machine.
    time_, time_of_ce = (statistics.quantiles(t.step_seconds, n=10)[0] for t in (tally, reference))
    return {
        "network": net,
        "loss": loss,
        "accuracy %": round(100 * statistics.mean(tally.accuracy), 2),
        "sd over seeds": round(100 * _spread(tally.accuracy), 2),
        "epochs to 95 %": round(statistics.mean(reached), 1) if reached else None,
        "reached by": f"{len(reached)} of {len(tally.goal)}",
        "time of a step / ce": round(time_ / time_of_ce, 2),
        "calibration error %": round(100 * statistics.mean(tally.calibration), 1),
    }


def _noisy_row(loss: str, tally: _Tally) -> dict[str, Any]:
    return {
        "loss": loss,
        "accuracy %": round(100 * statistics.mean(tally.accuracy), 2),
        "sd over seeds": round(100 * _spread(tally.accuracy), 2),
        "wrong labels learnt %": round(100 * statistics.mean(tally.learnt), 1),
        "calibration error %": round(100 * statistics.mean(tally.calibration), 1),
    }


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _clean_note(rows: list[dict[str, Any]]) -> str:
    accuracy = [row["accuracy %"] for row in rows]
    seeds = max(row["sd over seeds"] for row in rows)
    gap = max(accuracy) - min(accuracy)
    return (
        f"With right labels all losses and networks end within {gap:.1f} points of each other; "
        f"the seed alone moves one by up to {seeds:.1f} (one standard deviation)."
    )


def _noisy_note(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    learnt, learnt_last = first["wrong labels learnt %"], last["wrong labels learnt %"]
    ahead = last["accuracy %"] - first["accuracy %"]
    return (
        f"{first['loss']} learns {learnt:.0f} % of the wrong labels by heart, {last['loss']} "
        f"{learnt_last:.0f} %; on test images with right labels {last['loss']} is {ahead:+.1f} "
        f"points from {first['loss']}."
    )


def show_table(
    heading: str, rows: list[dict[str, Any]], console: Console, *, note: str = ""
) -> None:
    """Print rows as the report has them, with a sentence below.

    Args:
        heading: In words.
        rows: Mappings of the same keys.
        console: Where.
        note: What to see in the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from rlo_core.runs.report import table_of

    text = table_of(heading, rows)
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for i, name in enumerate(text.columns):
        numeric = i in text.numeric
        table.add_column(name, justify="right" if numeric else "left", no_wrap=not numeric)
    for row in text.rows:
        table.add_row(*(cell or "-" for cell in row))
    console.print(table)
    if note:
        console.print(note, highlight=False)
