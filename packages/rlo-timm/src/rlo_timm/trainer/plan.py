"""What a run will be: every choice made and checked before anything is built or written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from rlo_core.errors import RunError

from rlo_timm.trainer.data import check_data
from rlo_timm.trainer.names import dataset_name, did_you_mean, net_name
from rlo_timm.trainer.nets import check_net, image_size, learning_rate, stem_of
from rlo_timm.trainer.optim import check_optimizer
from rlo_timm.trainer.settings import SettingsError, TrainSettings

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_SHORT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "fp16": "16-mixed"}
_SHORT |= {"bf16": "bf16-mixed", "fp32": "32-true"}


@dataclass(frozen=True)
class Plan:
    """Resolved settings, and what Lightning is told of the device.

    Args:
        settings: The options, none left to be decided but the seed.
        accelerator: Lightning's name of the device.
        devices: How many, or which one.
        stem: The stem of a network that has two, else None.
    """

    settings: TrainSettings
    accelerator: str
    devices: int | list[int]
    stem: str | None


def make_plan(settings: TrainSettings) -> Plan:
    """Resolve and check settings.

    Args:
        settings: As given.

    Raises:
        RLOError: what training would refuse, as far as it can be known without the data.
    """
    spec = settings.spec()
    check_optimizer(settings.opt)
    accelerator, devices = _device(settings)
    check_net(settings.net)
    side = check_data(settings)
    if settings.size is None:
        side = image_size(settings.net, side, pretrained=settings.pretrained)
    stem = stem_of(settings.net, side, settings.stem)
    for name in settings.loggers():
        if find_spec(name) is None and (name != "tensorboard" or settings.logger != "tensorboard"):
            raise SettingsError(f"--logger {name} needs {name}: pip install 'rlo-timm[{name}]'")
    if settings.push:
        check_push(settings.push)
    resolved = dataclasses.replace(
        settings,
        dataset=dataset_name(settings.dataset),
        net=net_name(settings.net),
        stem=stem or settings.stem,
        loss=str(spec),
        k=None,
        m=None,
        loss_schedule=None,
        size=side,
        lr=settings.lr or learning_rate(settings.net),
        precision=_precision(settings.precision, accelerator),
        logger=",".join(settings.loggers()) or "none",
        wandb=False,
    )
    return Plan(resolved, accelerator, devices, stem)


def _device(settings: TrainSettings) -> tuple[str, int | list[int]]:
    name, colon, number = settings.device.lower().partition(":")
    known = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    if name not in known or (colon and not number.isdigit()):
        hint = did_you_mean(name, known) or ";"
        raise SettingsError(
            f"unknown device {settings.device!r}{hint} there are {', '.join(known)}"
        )
    names = ("cuda", "mps") if name == "gpu" else (name,)
    if name != "auto" and not any(_available(one) for one in names):
        raise SettingsError(f"device {settings.device!r} is not available on this machine")
    if colon and name == "cpu":
        raise SettingsError(f"device must be 'cpu' without a number, got {settings.device!r}")
    return name, [int(number)] if colon else settings.devices


def _available(name: str) -> bool:
    return bool(cast("Any", AcceleratorRegistry.get(name)).is_available())


def _precision(name: str, accelerator: str) -> str:
    """Return mixed precision where the device has it: bfloat16, or float16 where it lacks that."""
    if name != "auto":
        short = _SHORT.get(name.lower(), name.lower())
        if short not in PRECISIONS:
            hint = did_you_mean(name, [*_SHORT, *PRECISIONS]) or ";"
            known = ", ".join(["auto", *PRECISIONS])
            raise SettingsError(f"unknown precision {name!r}{hint} there are {known}")
        return short
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


def check_push(repository: str) -> None:
    """Refuse a repository that nothing can be pushed to, before hours of training.

    Raises:
        RunError: not a repository's name, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RunError(f"push must be OWNER/NAME, got {repository!r}: {error}") from error
    if not get_token():
        raise RunError(f"to push to {repository!r}, log in first: `hf auth login`, or set HF_TOKEN")
