"""One step of training and of validation."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from rlo_core.errors import RLOError
from rlo_core.registry import create_loss
from rlo_core.schedules import set_progress
from timm.data.mixup import Mixup
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from rlo_timm.trainer.measures import Measures
from rlo_timm.trainer.optim import create_optimizer, create_schedule
from rlo_timm.trainer.settings import SettingsError, TrainSettings

CHECKED_EVERY = 50
"""Steps between two looks at whether the loss is still a number."""


class DivergedError(RLOError):
    """A training loss or a weight that is no number any more."""


class Classifier(pl.LightningModule):
    """A network, a loss of the family, and the measures that do not depend on it.

    After each epoch `measured` has what was measured: in "train" `loss`, `acc1` and `lr`, in "val"
    what `Measures` names. With `model_ema` validation is of the moving average.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: TrainSettings,
        *,
        classes: int,
        teacher: nn.Module | None = None,
        show_loss: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.settings = settings
        self.val_criterion = create_loss(settings.spec())
        self.criterion = create_loss(settings.spec(), label_smoothing=settings.smoothing)
        self.mixup: Mixup | None = None
        if settings.mixup or settings.cutmix:
            # The targets come out smoothed, so the criterion must not smooth them again.
            self.criterion = create_loss(settings.spec())
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.mixup_switch_prob,
                label_smoothing=settings.smoothing,
                num_classes=classes,
            )
        self.ema = ModelEmaV3(net, decay=settings.model_ema_decay) if settings.model_ema else None
        self.show_loss = show_loss
        self.measured: dict[str, dict[str, float]] = {}
        self._task = (
            [] if teacher is None else [_distillation(net, teacher, self.criterion, settings)]
        )
        self._optimizer = create_optimizer(net, settings)
        self._fresh = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._schedule: Scheduler | None = None
        self._schedule_state: dict[str, Any] = {}
        self._sums = torch.zeros(3)
        self._val: Measures | None = None
        self._updates = 0
        self._steps = 1.0

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, 3, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return timm's optimiser; its schedule is ours to move, so that a resume draws it anew."""
        return self._optimizer

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as timm does: by norm, by value, or adaptively."""
        if self.settings.clip_grad is not None:
            dispatch_clip_grad(
                self.net.parameters(), self.settings.clip_grad, mode=self.settings.clip_mode
            )

    def on_train_start(self) -> None:
        """Make the schedule, and undo the options that a checkpoint gave the optimiser."""
        for group, fresh in zip(self._optimizer.param_groups, self._fresh, strict=True):
            group.update(fresh)
        for task in self._task:
            task.to(self.device)
        updates = math.ceil(self.trainer.num_training_batches / self.settings.grad_accum)
        self._steps = float(max(1, updates * self.settings.epochs))
        self._schedule = create_schedule(self._optimizer, self.settings, updates)
        self._updates = self.trainer.global_step
        if self._schedule is not None:
            if self._schedule_state and isinstance(self._schedule, PlateauLRScheduler):
                self._schedule.lr_scheduler.load_state_dict(self._schedule_state["state"])
                for group, lr in zip(
                    self._optimizer.param_groups, self._schedule_state["lr"], strict=True
                ):
                    group["lr"] = lr
            elif self.settings.sched_on_updates:
                self._schedule.step_update(self._updates)
            elif self.settings.scheduler != "plateau":
                self._schedule.step(self.current_epoch)
        self._sums = torch.zeros(3, device=self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the objective of one batch."""
        images, labels = batch
        set_progress(self.criterion, min(1.0, self._updates / self._steps))
        target = labels
        if self.mixup is not None:
            images, target = _mixed(self.mixup, images, labels)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss: Tensor
        if self._task:
            result = self._task[0](images, target)
            logits, loss = result["output"], result["loss"]
        else:
            logits = self.net(images)
            loss = self.criterion(logits, target)
        with torch.no_grad():
            count = len(images)
            right = (logits.argmax(-1) == labels).sum()
            seen = loss.detach().float() * count
            self._sums += torch.stack([seen, right.float(), torch.full_like(seen, count)])
            scaled = self.trainer.precision == "16-mixed"  # its scaler skips what is no number
            if batch_idx % CHECKED_EVERY == 0 and not scaled and not torch.isfinite(loss):
                raise DivergedError(self._diverged("loss", float(loss)))
        if self.show_loss:
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the schedule and the average after an update."""
        if self.trainer.global_step == self._updates:
            return
        self._updates = self.trainer.global_step
        if self._schedule is not None and self.settings.sched_on_updates:
            self._schedule.step_update(self._updates)
        if self.ema is not None:
            self.ema.update(self.net, step=self._updates)

    def on_validation_epoch_start(self) -> None:
        """Begin to add up."""
        self._val = Measures(self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        images, labels = batch
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        net = self.net if self.ema is None else self.ema.module
        logits = net(images).float()
        assert self._val is not None
        self._val.update(logits, labels, self.val_criterion(logits, labels))

    def on_validation_epoch_end(self) -> None:
        """Add up over the devices."""
        assert self._val is not None
        self._val.sums = self._summed(self._val.sums)
        self.measured["val"] = self._val.result()

    def on_train_epoch_end(self) -> None:
        """Add up over the devices, and move the schedule to the next epoch."""
        loss, right, count = self._summed(self._sums).tolist()
        lr = self._optimizer.param_groups[0]["lr"]
        self.measured["train"] = {"loss": loss / count, "acc1": right / count, "lr": lr}
        self._sums = torch.zeros(3, device=self.device)
        if self._schedule is not None and not self.settings.sched_on_updates:
            metric = self.measured.get("val", {}).get("acc1")
            self._schedule.step(self.current_epoch + 1, metric)

    def check(self) -> None:
        """Raise DivergedError if the epoch's training loss or cross entropy is no number."""
        for split, name in (("train", "loss"), ("val", "ce")):
            value = self.measured.get(split, {}).get(name, 0.0)
            if not math.isfinite(value):
                raise DivergedError(self._diverged(f"{split} {name}", value))

    def _diverged(self, what: str, value: float) -> str:
        return (
            f"the run diverged in epoch {self.current_epoch + 1}: {what} is {value}; try a smaller "
            "--lr, --warmup-epochs or --clip-grad 1"
        )

    def _summed(self, sums: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the one schedule that has a state."""
        if isinstance(self._schedule, PlateauLRScheduler):
            checkpoint["schedule"] = {
                "state": self._schedule.lr_scheduler.state_dict(),
                "lr": [group["lr"] for group in self._optimizer.param_groups],
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self._schedule_state = checkpoint.get("schedule", {})

    def weights(self) -> dict[str, Tensor]:
        """Return what a finished run saves: the network's weights, or their average."""
        return dict((self.net if self.ema is None else self.ema.module).state_dict())


def _mixed(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix a batch; an odd one is mixed with its first picture repeated, which is then left out."""
    if len(images) % 2 == 0:
        mixed: tuple[Tensor, Tensor] = mixup(images, labels)
        return mixed
    more = torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]])
    images, target = mixup(*more)
    return images[:-1], target[:-1]


def _distillation(
    net: nn.Module, teacher: nn.Module, criterion: nn.Module, settings: TrainSettings
) -> Any:
    """Return timm's task, kept in a list so that the teacher is in no checkpoint."""
    try:
        from timm.task import LogitDistillationTask
    except ImportError as error:
        raise SettingsError("kd_model needs timm 1.0.23 or later") from error
    return LogitDistillationTask(
        student_model=net,
        teacher_model=teacher,
        criterion=criterion,
        task_loss_weight=settings.task_loss_weight,
        distill_loss_weight=settings.distill_loss_weight,
        temperature=settings.kd_temperature,
        verbose=False,
    )
