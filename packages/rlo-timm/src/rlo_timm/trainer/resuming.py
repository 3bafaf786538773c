"""A run that was stopped goes on: what it has, and what it may not change."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from rlo_core.errors import RunError
from rlo_core.registry import LossSpec
from rlo_core.runs.record import RUN_FILE, read_run

from rlo_timm.trainer.callbacks import CHECKPOINTS
from rlo_timm.trainer.names import dataset_name, net_name
from rlo_timm.trainer.settings import TrainSettings

_KEPT_ON_RESUME = ("dataset", "net", "opt")
"""What a resumed run may not change."""
_SCHEDULED = ("schedule", "warmup", "k_start")
"""The options of a loss that `--loss-schedule` stands for."""

_logger = logging.getLogger("rlo_timm")


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its settings, its last checkpoint, its seed, the epochs that it has."""

    folder: Path
    settings: TrainSettings
    checkpoint: Path
    seed: int | None
    epochs: int


def resumable(folder: str | os.PathLike[str]) -> Resumed:
    """Return what is needed to go on with a run.

    Raises:
        RunError: no run there, one that did not finish an epoch, or a checkpoint that is broken.
    """
    folder = Path(folder)
    document = read_run(folder)
    checkpoint = folder / CHECKPOINTS / "last.ckpt"
    if document.get("kind") != "timm train":
        raise RunError(f"{str(folder)!r} is a run of {document.get('kind')!r}, not of `timm train`")
    if not checkpoint.is_file():
        raise RunError(f"{str(folder)!r} cannot be resumed: it has no {CHECKPOINTS}/last.ckpt yet")
    options = document.get("options")
    if not isinstance(options, dict):
        raise RunError(f"{str(folder / RUN_FILE)!r} has no options, so nothing can go on from it")
    settings = TrainSettings.from_mapping(options, source=str(folder / RUN_FILE))
    try:
        epochs = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]) + 1
    except Exception as error:  # a broken file raises whatever its bytes lead to
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"{str(checkpoint)!r} is no checkpoint of a run: {why}") from error
    return Resumed(folder, settings, checkpoint, document.get("seed"), epochs)


def check_resumed(old: Resumed, new: TrainSettings) -> None:
    """Raise RunError where a resumed run would be another one; warn where its loss is another.

    `new` may be as given; names are compared as the run has them.
    """
    folder = str(old.folder)
    named = {"dataset": dataset_name(new.dataset), "net": net_name(new.net), "opt": new.opt}
    for name in _KEPT_ON_RESUME:
        before = getattr(old.settings, name)
        if before != named[name]:
            raise RunError(f"{folder!r} was trained with {name}={before!r}, got {named[name]!r}")
    if new.size is not None and old.settings.size != new.size:
        raise RunError(f"{folder!r} was trained with size={old.settings.size!r}, got {new.size!r}")
    if new.epochs <= old.epochs:
        raise RunError(
            f"{folder!r} has {old.epochs} epochs already; --epochs {old.epochs + 1} or more goes on"
        )
    before, now = str(old.settings.spec()), str(new.spec())
    if before != now:
        _logger.warning("%s was trained with loss '%s'; it goes on with '%s'", folder, before, now)


def keep_loss(old: TrainSettings, new: TrainSettings, given: Collection[str]) -> TrainSettings:
    """Return `new` with what is left unsaid of its loss taken from the run that is resumed.

    `--k 3` alone changes k and keeps the loss, its m, its gates and its schedule; another `--loss`
    comes whole, and nothing of the saved one is kept.

    Args:
        old: The settings of the run.
        new: The settings that it goes on with; their k, m and schedule are those given, or None.
        given: The names of the options that were given.
    """
    if "loss" in given:
        return new
    spec = old.spec()
    options = dict(spec.options)
    if new.loss_schedule is not None:
        options = {key: value for key, value in options.items() if key not in _SCHEDULED}
    changed = {key: value for key, value in (("k", new.k), ("m", new.m)) if value is not None}
    options |= {key: f"{value:g}" for key, value in changed.items()}
    loss = str(LossSpec(spec.name, options, spec.gates))
    return dataclasses.replace(new, loss=loss, k=None, m=None)
