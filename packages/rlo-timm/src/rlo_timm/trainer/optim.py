"""timm's optimisers and schedules from the settings."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from rlo_timm.trainer.names import did_you_mean
from rlo_timm.trainer.nets import learning_rate
from rlo_timm.trainer.settings import SettingsError, TrainSettings


def check_optimizer(name: str) -> None:
    """Raise SettingsError for an optimiser that timm does not have."""
    base = name.lower().split("_")[-1] if name.lower().startswith("lookahead_") else name.lower()
    known = [str(known) for known in list_optimizers()]
    if base not in known:
        hint = did_you_mean(base, known) or ";"
        raise SettingsError(f"unknown opt {name!r}{hint} timm has {', '.join(known)}")


def create_optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return timm's optimiser of a network's parameters.

    Raises:
        SettingsError: no such optimiser, or one that its package or this network does not allow.
    """
    check_optimizer(settings.opt)
    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            net,
            opt=settings.opt,
            lr=settings.lr or learning_rate(settings.net),
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
        )
    except (ImportError, AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise SettingsError(f"opt {settings.opt!r}: {error}") from error
    return made


def create_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, updates_per_epoch: int
) -> Scheduler | None:
    """Return timm's schedule, which is a function of the epoch or of the update; None for none."""
    options: dict[str, Any] = {"sched": settings.scheduler, "decay_rate": settings.decay_rate}
    if settings.scheduler == "none":
        if not settings.warmup_epochs:
            return None
        options = {"sched": "step", "decay_rate": 1.0}
    with warnings.catch_warnings():
        # timm means to drop plateau, because its own script does not save the state; ours does.
        warnings.filterwarnings("ignore", message=".*PlateauLRScheduler is deprecated.*")
        schedule, _ = create_scheduler_v2(
            optimizer,
            num_epochs=settings.epochs,
            decay_epochs=settings.decay_epochs,
            decay_milestones=settings.milestones(),
            patience_epochs=settings.patience_epochs,
            min_lr=settings.min_lr,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.warmup_lr,
            step_on_epochs=not settings.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
            **options,
        )
    made: Scheduler | None = schedule
    return made
