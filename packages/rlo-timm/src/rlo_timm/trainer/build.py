"""What a run is made of: data, network, teacher, criterion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rlo_core.errors import RunError
from torch import nn

from rlo_timm.trainer.data import Data, load_data
from rlo_timm.trainer.evaluate import open_model
from rlo_timm.trainer.loaders import Inputs, inputs_of
from rlo_timm.trainer.module import Classifier
from rlo_timm.trainer.names import HUB_PREFIXES
from rlo_timm.trainer.nets import create_net
from rlo_timm.trainer.plan import Plan
from rlo_timm.trainer.publish import describe_inputs
from rlo_timm.trainer.resuming import Resumed
from rlo_timm.trainer.settings import TrainSettings


@dataclass(frozen=True)
class Built:
    """What a run is made of."""

    plan: Plan
    data: Data
    inputs: Inputs
    module: Classifier


def build(plan: Plan, old: Resumed | None, seed: int, *, progress: bool) -> Built:
    """Make everything that training needs; nothing is written.

    Args:
        plan: The resolved options.
        old: The run that is resumed; its checkpoint has the weights.
        seed: Of the choice of images.
        progress: Show the loss of each step.

    Raises:
        RLOError: the data, the network or the loss cannot be had.
    """
    settings = plan.settings
    assert settings.size is not None
    data = load_data(settings, seed=seed)
    net = create_net(
        settings.net,
        classes=len(data.classes),
        size=settings.size,
        stem=settings.stem,
        pretrained=settings.pretrained and old is None,
        finetune_from=None if old else settings.finetune_from,
        drop=settings.drop,
        drop_path=settings.drop_path,
    )
    inputs = inputs_of(settings, data, net, settings.size)
    describe_inputs(net, inputs)
    if settings.channels_last:
        net = net.to(memory_format=torch.channels_last)
    teacher = None if settings.kd_model is None else _teacher(settings, len(data.classes))
    module = Classifier(
        net, settings, classes=len(data.classes), teacher=teacher, show_loss=progress
    )
    if settings.compile:
        net.compile()
    return Built(plan, data, inputs, module)


def _teacher(settings: TrainSettings, classes: int) -> nn.Module:
    assert settings.kd_model is not None
    assert settings.size is not None
    if Path(settings.kd_model).is_dir() or settings.kd_model.startswith(HUB_PREFIXES):
        teacher = open_model(settings.kd_model)
    else:
        teacher = create_net(
            settings.kd_model, classes=classes, size=settings.size, pretrained=True
        )
    if teacher.num_classes != classes:
        raise RunError(
            f"kd_model {settings.kd_model!r} has {teacher.num_classes} classes, the data {classes}"
        )
    return teacher.eval()
