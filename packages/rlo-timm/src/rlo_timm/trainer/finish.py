"""What a run leaves in the end: the best weights, the summary, the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rlo_core.runs.record import Run, read_metrics
from rlo_core.runs.report import write_report

from rlo_timm.trainer.build import Built
from rlo_timm.trainer.callbacks import CHECKPOINTS
from rlo_timm.trainer.nets import architecture
from rlo_timm.trainer.publish import describe_inputs, push, save_model
from rlo_timm.trainer.run_folder import REPORT


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; the numbers are of its best epoch, on the validation images.

    Args:
        run: The run folder; None for `fast_dev_run`.
        loss: The spec of the training loss.
        epochs: How many there are.
        best_epoch: The first one of the highest top-1, counted from 1.
        acc1: Share of images whose class comes first.
        acc5: Share whose class is among the first five.
        ce: Cross entropy in nats.
        ece: Expected calibration error, 15 bins.
    """

    run: Path | None
    loss: str
    epochs: int
    best_epoch: int
    acc1: float
    acc5: float
    ce: float
    ece: float


def finish(built: Built, run: Run, folder: Path, loss: str) -> TrainResult:
    """Write the best weights, the summary and the report."""
    settings = built.plan.settings
    checkpoint = torch.load(
        folder / CHECKPOINTS / "best.ckpt", map_location="cpu", weights_only=True
    )
    prefix = "ema.module." if settings.model_ema else "net."
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    best = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert settings.size is not None
    name, options = architecture(settings.net, settings.size, settings.stem)
    # A network of its own: the trained one may be compiled, on a device, in half precision.
    net = timm.create_model(name, num_classes=len(built.data.classes), **options)
    describe_inputs(net, built.inputs)
    net.load_state_dict(best)
    save_model(net, folder, inputs=built.inputs, options=options, classes=list(built.data.classes))
    epochs = [r for r in read_metrics(folder) if r.get("split") == "val"]
    top = max(epochs, key=lambda r: float(r["acc1"]))
    numbers = {name: float(top[name]) for name in ("acc1", "acc5", "ce", "ece")}
    summary: dict[str, Any] = {"epochs": int(epochs[-1]["epoch"]), "best_epoch": int(top["epoch"])}
    run.finish(**summary | {k: round(v, 6) if math.isfinite(v) else v for k, v in numbers.items()})
    write_report([folder], folder / REPORT)
    if settings.push:
        push(folder, settings.push)
    return TrainResult(folder, loss, summary["epochs"], summary["best_epoch"], **numbers)
