"""What our loss costs in timm's training step, and our loader and epoch beside timm's own.

`python benchmarks/bench_timm.py [--batch N] [--rounds N]`. `--loader` measures the loader alone:
timm's `create_loader` with its own sampler, and ours, over the same pictures, transforms and
process, an epoch each, interleaved (`results/timm_loader.jsonl`). Without it, two measurements: the
whole step of
ResNet-18 with a CIFAR stem (forward, backward, SGD), both losses interleaved: what a user sees,
with the machine's noise in it. The loss and its gradient alone, which differ by microseconds that
the step cannot resolve; their difference over the step is the overhead. Batch 16 because a CPU step
is most of a second already; a larger batch or image makes the loss's share smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import click
import rlo_timm.models  # noqa: F401
import timm
import torch
from harness import compare, write_results
from rlo_core.registry import parse_spec
from rlo_timm.launcher.criteria import counterpart
from rlo_timm.trainer.data import load_data
from rlo_timm.trainer.loaders import Inputs, TrainBatches, train_loader
from rlo_timm.trainer.pictures import Pictures
from rlo_timm.trainer.settings import TrainSettings
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from torch import Tensor, nn

SPEC = parse_spec("rlo:k=8,m=10")
HOST: dict[str, Callable[[], nn.Module]] = {
    "cross entropy": nn.CrossEntropyLoss,
    "smoothing 0.1": lambda: LabelSmoothingCrossEntropy(0.1),
    "mixup": SoftTargetCrossEntropy,
    "bce": lambda: BinaryCrossEntropy(0.1),
    "jsd, 2 splits": lambda: JsdCrossEntropy(num_splits=2, smoothing=0.1),
}


def target_of(case: str, batch: int, classes: int) -> Tensor:
    if case == "mixup":
        return torch.rand(batch, classes).softmax(-1)
    return torch.randint(classes, (batch,))


def step(model: nn.Module, loss: nn.Module, images: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        loss(model(images), target).backward()
        optimizer.step()

    return run


def alone(loss: nn.Module, logits: Tensor, target: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(50):
            x = logits.detach().requires_grad_()
            loss(x, target).backward()

    return run


def measure_loader(rounds: int, images: int) -> list[dict[str, object]]:
    """Time an epoch of each loader over scikit-learn's digits as 32x32 pictures, no workers."""
    device = torch.device("cpu")
    settings = TrainSettings(
        dataset="digits", train_limit=images, workers=0, batch_size=32, augment=True
    )
    records: list[dict[str, object]] = []
    for name, options in {
        "crop and flip": {},
        "rand-m9-mstd0.5": {"aa": "rand-m9-mstd0.5"},
    }.items():
        settings = dataclasses.replace(settings, **options)  # type: ignore[arg-type]
        ours_data, host_data = load_data(settings), load_data(settings)
        assert isinstance(ours_data.train, Pictures)
        batches = TrainBatches(ours_data.train, 32, seed=1)
        ours = train_loader(ours_data, settings, Inputs(32), batches, device)
        # The same transforms, timm's own shuffling sampler.
        host = train_loader(host_data, settings, Inputs(32), None, device)

        def epoch(loader: object) -> Callable[[], None]:
            def run() -> None:
                for _ in loader:  # type: ignore[attr-defined]
                    pass

            return run

        times = compare({"timm": epoch(host), "rlo": epoch(ours)}, rounds=rounds, warmup=2)
        for loader, t in times.items():
            count = images if loader == "rlo" else images // 32 * 32  # timm drops the last batch
            records.append(
                {
                    "what": "loader",
                    "transforms": name,
                    "loader": loader,
                    "images_per_second": count / t["median"],
                    "q1": count / t["q3"],
                    "q3": count / t["q1"],
                    "rounds": rounds,
                }
            )
    return records


@click.command()
@click.option("--loader", is_flag=True, help="Measure the loader only.")
@click.option("--batch", default=16, show_default=True)
@click.option("--rounds", default=8, show_default=True)
def main(loader: bool, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    if loader:
        records = measure_loader(rounds, 512)
        for record in records:
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in record.items()})
        write_results("timm_loader", records)
        return
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar", num_classes=10)
    images = torch.randn(batch, 3, 32, 32)
    steps: dict[str, Callable[[], None]] = {}
    for case in ("smoothing 0.1", "mixup"):
        target = target_of(case, batch, 10)
        steps[f"{case}, timm"] = step(model, HOST[case](), images, target)
        steps[f"{case}, rlo"] = step(model, counterpart(HOST[case](), SPEC), images, target)
    whole = compare(steps, rounds=rounds, warmup=1)
    step_seconds = whole["smoothing 0.1, timm"]["median"]
    records = [
        {
            "what": "step",
            "model": "resnet18_cifar",
            "case": name,
            "batch": batch,
            "images_per_second": batch / t["median"],
            "q1_ms": t["q1"] * 1e3,
            "median_ms": t["median"] * 1e3,
            "q3_ms": t["q3"] * 1e3,
        }
        for name, t in whole.items()
    ]
    for classes in (10, 1000):
        for case, make in HOST.items():
            logits, target = torch.randn(batch, classes), target_of(case, batch, classes)
            timed = compare(
                {
                    "timm": alone(make(), logits, target),
                    "rlo": alone(counterpart(make(), SPEC), logits, target),
                },
                rounds=15,
                warmup=2,
            )
            host, ours = (timed[name]["median"] / 50 for name in ("timm", "rlo"))
            records.append(
                {
                    "what": "loss and gradient",
                    "case": case,
                    "batch": batch,
                    "classes": classes,
                    "timm_us": host * 1e6,
                    "rlo_us": ours * 1e6,
                    "overhead_of_step_percent": 100 * (ours - host) / step_seconds,
                }
            )
    for record in records:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in record.items()})
    write_results("timm", records)


if __name__ == "__main__":
    main()
