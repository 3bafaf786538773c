"""One step of training and of validation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from rlo_core.registry import create_loss
from rlo_core.schedules import set_progress
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from rlo_timm.trainer.nets import learning_rate
from rlo_timm.trainer.settings import Settings

CALIBRATION_BINS = 15


class Classifier(pl.LightningModule):
    """A network, a loss of the family, and the measures that do not depend on it.

    Logs `train_loss`, `train_acc1` and after each epoch `val_loss` (the objective), `val_ce`,
    `val_acc1`, `val_acc5` and `val_ece`.
    """

    def __init__(self, net: nn.Module, settings: Settings, *, classes: int) -> None:
        super().__init__()
        self.net = net
        self.settings = settings
        self.criterion = create_loss(settings.spec(), label_smoothing=settings.smoothing)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            # The targets come out smoothed, so the criterion must not smooth them again.
            self.criterion = create_loss(settings.spec())
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=classes,
            )
        self.train_loss, self.train_acc1 = MeanMetric(), MeanMetric()
        self.val_loss, self.val_ce = MeanMetric(), MeanMetric()
        self.measures = MetricCollection(
            {
                "val_acc1": MulticlassAccuracy(classes, average="micro"),
                "val_acc5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
                "val_ece": MulticlassCalibrationError(classes, n_bins=CALIBRATION_BINS),
            },
            compute_groups=False,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, 3, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the objective of one batch."""
        images, labels = batch
        steps = self.trainer.estimated_stepping_batches
        set_progress(self.criterion, min(1.0, self.global_step / max(1.0, float(steps))))
        target = labels
        if self.mixup is not None and len(images) % 2 == 0:
            images, target = self.mixup(images, labels)
        logits = self(images)
        loss: Tensor = self.criterion(logits, target)
        self.train_loss.update(loss.detach(), len(images))
        self.train_acc1.update((logits.detach().argmax(-1) == labels).float())
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train_acc1", self.train_acc1, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        images, labels = batch
        logits = self(images).float()
        self.val_ce.update(F.cross_entropy(logits, labels), len(labels))
        self.val_loss.update(self.criterion(logits, labels), len(labels))
        # Probabilities: torchmetrics would guess, batch by batch, whether logits are.
        self.measures.update(logits.softmax(-1), labels)
        self.log("val_loss", self.val_loss, on_epoch=True)
        self.log("val_ce", self.val_ce, on_epoch=True, prog_bar=True)
        self.log_dict(dict(self.measures.items()), on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return timm's optimiser, and a schedule that is stepped each epoch."""
        settings = self.settings
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.net,
            opt=settings.opt,
            lr=settings.lr or learning_rate(settings.net),
            weight_decay=settings.weight_decay,
        )
        warmup = min(settings.warmup_epochs, settings.epochs - 1)
        rest = settings.epochs - warmup
        after: LRScheduler
        if settings.scheduler == "cosine":
            after = CosineAnnealingLR(optimizer, T_max=rest)
        else:
            after = ConstantLR(optimizer, factor=1.0, total_iters=0)
        if not warmup:
            return [optimizer], [after]
        first = LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
        return [optimizer], [SequentialLR(optimizer, [first, after], milestones=[warmup])]
