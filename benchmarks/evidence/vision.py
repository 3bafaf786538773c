"""Vision evidence: losses on CIFAR-10, learning rate tuned per loss, clean and noisy labels.

    python benchmarks/evidence/vision.py benchmarks/evidence/configs/vision-cpu.yaml

For each model, label noise and loss: every learning rate of the grid with the first seed, the best
by accuracy on a clean validation split, then the other seeds with it. Test figures are of the last
epoch.
"""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rlo_core import create_loss
from rlo_core.errors import DataError
from rlo_core.runs.record import Run
from runner import RESULTS, ROOT, Results, data_folder, load_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from vision_models import ResNet20, build

COST_ROUNDS = 60
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_images(folder: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return normalised images (N, 3, 32, 32) and labels (N) of the parquet files of a split."""
    import pyarrow.parquet as parquet
    from PIL import Image

    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in sorted(folder.glob(f"{split}-*.parquet")):
        for row in parquet.read_table(file).to_pylist():
            if limit is not None and len(labels) == limit:
                break
            images.append(np.asarray(Image.open(BytesIO(row["img"]["bytes"])).convert("RGB")))
            labels.append(row["label"])
    if not images:
        raise DataError(f"no {split}-*.parquet in {folder}")
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x, torch.tensor(labels)


def with_noise(labels: Tensor, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by one of the nine others, evenly (symmetric noise)."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    noisy[wrong] = (labels[wrong] + shift) % 10
    return noisy


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop from a padding of 4 pixels and flip, for each image."""
    n, _, h, w = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(h))[:, None, :, None]
    flip = torch.rand(n, generator=generator)[:, None] < 0.5
    columns = torch.where(flip, torch.arange(w).flip(0), torch.arange(w))
    columns = (left[:, None] + columns)[:, None, None, :]
    return padded[
        torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], rows, columns
    ]


@torch.no_grad()
def features_of(x: Tensor, checkpoint: Path) -> Tensor:
    """Return the 64 features (N, 64) of normalised images by a pretrained ResNet-20."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    theirs = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    net = ResNet20()
    weights = load_file(checkpoint)
    net.load_state_dict({n: w for n, w in weights.items() if "linear" not in n}, strict=False)
    net.eval()
    return torch.cat([net((part * std + mean - theirs) / spread) for part in x.split(250)])


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> dict[str, float]:
    """Return accuracy, cross entropy in nats and the expected calibration error of 15 bins."""
    net.eval()
    logits = torch.cat([net(part.to(device)).float().cpu() for part in x.split(500)])
    return {
        "accuracy": float((logits.argmax(1) == y).float().mean()),
        "ce": float(F.cross_entropy(logits, y)),
        "ece": float(multiclass_calibration_error(logits.softmax(1), y, 10, n_bins=15)),
    }


class Task:
    """The images, the splits and the recipe of one configuration."""

    def __init__(self, config: dict[str, Any], folder: Path, runs: Path | None) -> None:
        self.config = config
        self.runs = runs
        name = config["device"]
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        held = config["validation_images"]
        limit = config["train_images"]
        x, y = load_images(folder, "train", None if limit is None else limit + held)
        test, test_y = load_images(folder, "test", config["test_images"])
        self.images = "features" not in config
        if not self.images:
            checkpoint = data_folder("resnet-cifar10", None) / config["features"]
            x, test = features_of(x, checkpoint), features_of(test, checkpoint)
        self.train = (x[:-held], y[:-held])
        self.validation = (x[-held:], y[-held:])
        self.test = (test, test_y)

    def run(
        self, model: str, loss: str, *, noise: float, lr: float, seed: int, name: str
    ) -> dict[str, Any]:
        """Train once and return what was measured."""
        config, device = self.config, self.device
        settings = config["models"][model]
        torch.manual_seed(seed)
        net = build(settings["build"], settings["options"]).to(device)
        layout = torch.channels_last if self.images else torch.contiguous_format
        net = net.to(memory_format=layout)
        criterion = create_loss(loss).to(device)
        epochs, batch = settings["epochs"], config["batch_size"]
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=lr, weight_decay=config["weight_decay"], fused=True
        )
        x, clean = self.train
        y = with_noise(clean, noise, seed)
        steps = epochs * (len(x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=lr, total_steps=steps, pct_start=config["warmup"]
        )
        generator = torch.Generator().manual_seed(seed)
        folder = None if self.runs is None else self.runs / name.replace("/", "_").replace(":", "-")
        run = folder and Run.create(
            folder,
            kind="evidence vision",
            loss=loss,
            options={"model": model, "noise": noise, "lr": lr, "epochs": epochs, "batch": batch},
            seed=seed,
            data={"name": "cifar10", "train": len(x), "test": len(self.test[1])},
        )
        curve, clock, spent = [], time.process_time, 0.0
        if device.type == "cuda":
            clock = time.perf_counter
        for epoch in range(1, epochs + 1):
            net.train()
            start = clock()
            total = torch.zeros((), device=device)
            order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch]
            for index in order.split(batch):
                images = augment(x[index], generator) if self.images else x[index]
                images = images.to(device, memory_format=layout)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = net(images)
                value = criterion(logits.float(), y[index].to(device))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                schedule.step()
                total += value.detach()
            objective = float(total) * batch / len(order)
            spent += clock() - start
            measured = evaluate(net, *self.validation, device)
            curve.append({"epoch": epoch, "objective": objective, "seconds": spent, **measured})
            if run:
                run.log(epoch=epoch, split="train", objective=objective)
                run.log(epoch=epoch, split="val", **measured)
        test = evaluate(net, *self.test, device)
        if run:
            run.finish(**{f"test_{key}": value for key, value in test.items()})
        reached = [p for p in curve if p["accuracy"] >= settings["target_accuracy"]]
        return {
            "model": model,
            "loss": loss,
            "noise": noise,
            "lr": lr,
            "seed": seed,
            "validation_accuracy": curve[-1]["accuracy"],
            "test": test,
            "ms_per_step": 1000 * spent / steps,
            "epochs_to_target": reached[0]["epoch"] if reached else None,
            "seconds_to_target": reached[0]["seconds"] if reached else None,
            "curve": [[round(p["accuracy"], 4), round(p["objective"], 5)] for p in curve],
        }


def tuned(
    task: Task, results: Results, model: str, loss: str, noise: float, grid_of: list[float]
) -> None:
    """Measure the grid with the first seed, then the other seeds at the best learning rate."""
    seeds = task.config["seeds"]

    def measure(lr: float, seed: int) -> dict[str, Any]:
        name = f"{model}/noise={noise:g}/{loss}/lr={lr:g}/seed={seed}"
        return results.measure(
            name, lambda: task.run(model, loss, noise=noise, lr=lr, seed=seed, name=name)
        )

    grid = [measure(lr, seeds[0]) for lr in grid_of]
    best = max(grid, key=lambda record: record["validation_accuracy"])
    for seed in seeds[1:]:
        measure(best["lr"], seed)


def step_cost(task: Task, model: str, losses: list[str]) -> dict[str, Any]:
    """Time one training step per loss, interleaved in one process."""
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from harness import compare

    settings = task.config["models"][model]
    net = build(settings["build"], settings["options"]).to(task.device)
    if task.images:
        net = net.to(memory_format=torch.channels_last)
    batch = task.config["batch_size"]
    x, y = task.train[0][:batch].to(task.device), task.train[1][:batch].to(task.device)

    def step(criterion: nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        criterion(net(x).float(), y).backward()

    criteria = {loss: create_loss(loss).to(task.device) for loss in losses}
    cuda = task.device.type == "cuda"
    times = compare(
        {loss: (lambda c=c: step(c)) for loss, c in criteria.items()},
        rounds=COST_ROUNDS,
        clock=time.perf_counter if cuda else time.process_time,
        synchronize=torch.cuda.synchronize if cuda else None,
    )
    return {"model": model, "rounds": COST_ROUNDS, "step_seconds": times}


@click.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", help="Folder with train-*.parquet and test-*.parquet.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "evidence_vision.jsonl")
@click.option("--runs", type=click.Path(path_type=Path), help="Write run folders for `rlo report`.")
@click.option("--cost-only", is_flag=True, help="Time a training step of each loss; train nothing.")
def main(
    config_file: Path, data: str | None, out: Path, runs: Path | None, cost_only: bool
) -> None:
    """Run what CONFIG_FILE lists and is not yet in the results."""
    torch.set_num_threads(1)
    config = load_config(config_file)
    results = Results(out, config)
    task = Task(config, data_folder("cifar10", data), runs)
    for model in config["models"]:
        results.measure(
            f"{model}/step-cost", lambda m=model: step_cost(task, m, config["step_cost"])
        )
    for group in [] if cost_only else config["groups"]:
        model = group["model"]
        grid = group.get("lr", config["models"][model]["lr"])
        for noise in group["noise"]:
            for loss in group["losses"]:
                tuned(task, results, model, loss, noise, grid)


if __name__ == "__main__":
    main()
