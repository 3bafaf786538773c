"""The demo's first part: five losses, two small networks, scikit-learn's handwritten digits.

Real data that comes inside a dependency: 1797 images of 8 x 8, a fifth of them held out.
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


NETWORKS: dict[str, Callable[[], ConvNet | TinyViT]] = {"conv": ConvNet, "vit": TinyViT}


@dataclass
class _Tally:
    """What the seeds of one network under one loss gave."""

    accuracy: list[float] = field(default_factory=list)
    calibration: list[float] = field(default_factory=list)
    goal: list[int | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


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
    seeds: tuple[int, ...] = SEEDS,
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """Train each network under each loss from each seed; return the table and the totals.

    Args:
        run_dir: Where `run.json` and `metrics.jsonl` go.
        console: Where the progress bar and the table are shown.
        losses: Spec strings; the first is what times are relative to.
        seeds: One training each.
        epochs: Of each training.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    train_x, train_y, test_x, test_y = load_digits()
    run = Run.create(
        run_dir,
        kind="demo digits",
        options={"losses": losses, "seeds": seeds, "epochs": epochs, "batch_size": BATCH},
        data={"name": "scikit-learn digits", "train": len(train_x), "test": len(test_x)},
    )
    tallies = {(net, loss): _Tally() for net in NETWORKS for loss in losses}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("digits", total=len(tallies) * len(seeds) * epochs)
        # Seeds outside, so that a machine that slows down slows all losses alike.
        for seed in seeds:
            for (net, loss), tally in tallies.items():
                bar.update(task, description=f"digits, {net}, {loss}")
                scores: list[dict[str, float]] = []
                data = (train_x, train_y, test_x, test_y)
                for scored in _train(net, loss, seed, epochs, data, tally.step_seconds):
                    scores.append(scored)
                    run.log(
                        net=net, loss=loss, seed=seed, epoch=len(scores), split="test", **scored
                    )
                    bar.advance(task)
                tally.accuracy.append(scores[-1]["accuracy"])
                tally.calibration.append(scores[-1]["calibration error"])
                reached = (i for i, s in enumerate(scores, 1) if s["accuracy"] >= GOAL)
                tally.goal.append(next(reached, None))
    rows = [
        _row(net, loss, tally, tallies[net, losses[0]]) for (net, loss), tally in tallies.items()
    ]
    _show(rows, console)
    summary: dict[str, Any] = {"trainings": len(tallies) * len(seeds), "digits": rows}
    run.finish(**summary)
    return summary


def _train(
    net: str,
    loss: str,
    seed: int,
    epochs: int,
    data: tuple[Tensor, ...],
    step_seconds: list[float],
) -> Iterator[dict[str, float]]:
    """Train one network; yield each epoch's scores, and append the time of each step."""
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
        yield _scores(model, test_x, test_y)


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


def _row(net: str, loss: str, tally: _Tally, reference: _Tally) -> dict[str, Any]:
    reached = [epoch for epoch in tally.goal if epoch is not None]
    # The lowest tenth: what a step costs when nothing else runs on the machine.
    time_, time_of_ce = (statistics.quantiles(t.step_seconds, n=10)[0] for t in (tally, reference))
    spread = statistics.stdev(tally.accuracy) if len(tally.accuracy) > 1 else 0.0
    return {
        "net": net,
        "loss": loss,
        "accuracy %": round(100 * statistics.mean(tally.accuracy), 2),
        "sd %": round(100 * spread, 2),
        "epochs to 95 %": round(statistics.mean(reached), 1) if reached else None,
        "reached by": f"{len(reached)} of {len(tally.goal)}",
        "step / ce": round(time_ / time_of_ce, 2),
        "calib. error": round(statistics.mean(tally.calibration), 4),
    }


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "Handwritten digits, test images: mean over seeds"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for name in rows[0]:
        words = name in ("net", "loss")
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    console.print(table)
