"""`rlo-timm eval`: the measures of a run's validation, of any model on any data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rlo_core.errors import DataError, RunError
from rlo_core.registry import create_loss, parse_spec
from timm.data.config import resolve_data_config
from torch import nn
from torch.utils.data import IterableDataset

from rlo_timm.trainer.data import load_data
from rlo_timm.trainer.loaders import Inputs, val_loader
from rlo_timm.trainer.measures import Measures
from rlo_timm.trainer.names import HUB_PREFIXES
from rlo_timm.trainer.nets import NetError, check_net
from rlo_timm.trainer.pictures import Pictures
from rlo_timm.trainer.publish import MODEL_CONFIG, WEIGHTS
from rlo_timm.trainer.settings import TrainSettings


@dataclass(frozen=True)
class EvalResult:
    """What a model does on a validation set.

    Args:
        images: How many.
        loss: The objective, a mean over the images.
        ce: Cross entropy in nats, a mean.
        acc1: Share whose class comes first.
        acc5: Share whose class is among the first five.
        ece: Expected calibration error, 15 bins.
    """

    images: int
    loss: float
    ce: float
    acc1: float
    acc5: float
    ece: float


def evaluate(
    model: str | Path,
    data: str,
    *,
    data_dir: str = "data",
    split: str = "validation",
    limit: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "cpu",
    loss: str = "ce",
    download: bool = True,
) -> EvalResult:
    """Measure a model on the validation part of a data set.

    Args:
        model: A finished run's folder, a timm model (with its weights), `hf-hub:OWNER/NAME` or
            `local-dir:FOLDER`.
        data: As `TrainSettings.dataset`.
        data_dir: Where named data sets are.
        split: Of a data set that timm opens.
        limit: Use this many images, all classes alike.
        batch_size: Images at a time; it changes nothing but the speed.
        workers: Data loading processes.
        device: A torch device.
        loss: The spec of the objective that is measured beside cross entropy.
        download: Let torchvision download what is missing.

    Raises:
        RLOError: the model, the data or the loss is not as it has to be.
    """
    criterion = create_loss(parse_spec(loss))
    settings = TrainSettings(
        dataset=data, data_dir=data_dir, val_split=split, val_limit=limit, download=download
    )
    net = open_model(str(model))
    opened = load_data(settings)
    classes = int(net.num_classes)  # type: ignore[arg-type]
    if classes != len(opened.classes):
        raise DataError(
            f"{str(model)!r} has {classes} classes, and {data!r} has {len(opened.classes)}"
        )
    try:
        where = torch.device(device)
        net = net.to(where).eval()
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {device!r}: {str(error).splitlines()[0]}") from error
    measures = Measures(where)
    for logits, labels in predictions(
        net, opened.val, batch_size=batch_size, workers=workers, device=where
    ):
        measures.update(logits, labels, criterion(logits, labels))
    return EvalResult(images=int(measures.sums[0]), **measures.result())


def predictions(
    net: nn.Module,
    pictures: Pictures | IterableDataset[Any],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits, float32, and labels of pictures under the network's own transform."""
    config = resolve_data_config({}, model=net)  # type: ignore[no-untyped-call]
    inputs = Inputs(
        int(config["input_size"][-1]),
        tuple(config["mean"]),
        tuple(config["std"]),
        str(config["interpolation"]),
        float(config["crop_pct"]),
    )
    net = net.to(device).eval()
    loader = val_loader(pictures, inputs, batch_size=batch_size, workers=workers, device=device)
    with torch.inference_mode():
        for images, labels in loader:
            yield net(images).float(), labels


def open_model(model: str) -> nn.Module:
    """Return a network with its weights.

    Raises:
        NetError: no such model, or weights that cannot be had.
        RunError: a run folder without a finished model.
    """
    folder = Path(model)
    name: str = model
    if folder.is_dir():
        if not (folder / MODEL_CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise RunError(f"{model!r} has no {WEIGHTS} and {MODEL_CONFIG}: it is no finished run")
        name = f"local-dir:{folder}"
    elif not model.startswith(HUB_PREFIXES) and not timm.is_model(
        timm.models.get_arch_name(model) if "/" not in model else model
    ):
        check_net(model)
        raise NetError(f"{model!r} is a network to train; give a run's folder or a timm model")
    try:
        made: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetError(f"{model!r} could not be opened: {reason}") from error
    opened: nn.Module = made
    return opened
