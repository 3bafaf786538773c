"""What an epoch is made of: the order of its images, its random numbers, its line in metrics.jsonl.

All of it depends on the seed and the epoch alone: a resumed run is the run that was stopped.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.callbacks import Callback
from rlo_core.runs.record import Run
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rlo_timm.trainer.data import Data
from rlo_timm.trainer.settings import Settings


class Loaders(pl.LightningDataModule):
    """Loaders whose order depends on the seed and the epoch only: a resumed run has it too."""

    def __init__(self, data: Data, settings: Settings, seed: int) -> None:
        super().__init__()
        self.data, self.settings, self.seed = data, settings, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; Lightning tells its sampler the epoch."""
        assert self.trainer is not None
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
            seed=self.seed,
        )
        return self._loader(sampler, self.data.train)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation loader."""
        assert self.trainer is not None
        sampler: DistributedSampler[Any] | None = None
        if self.trainer.world_size > 1:
            sampler = DistributedSampler(
                self.data.val,
                num_replicas=self.trainer.world_size,
                rank=self.trainer.global_rank,
                shuffle=False,
            )
        return self._loader(sampler, self.data.val)

    def _loader(self, sampler: Any, data: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.settings.batch_size,
            sampler=sampler,
            num_workers=self.settings.workers,
            generator=torch.Generator().manual_seed(self.seed),  # not the one that dropout draws on
            pin_memory=torch.cuda.is_available(),
        )


class RunLog(Callback):
    """Writes each epoch to metrics.jsonl, seeds its augmentation, knows what stopped the run."""

    def __init__(self, run: Run | None, seed: int) -> None:
        self.run, self.seed = run, seed
        self.lr = 0.0
        self.stopped_by: BaseException | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin: Lightning leaves `on_train_epoch_start` out for the first epoch after a resume."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed: dropout and mixup do not depend on how the run came to this epoch."""
        assert isinstance(trainer.datamodule, Loaders)  # type: ignore[attr-defined]
        trainer.datamodule.data.train.epoch = trainer.current_epoch  # type: ignore[attr-defined]
        mixed = self.seed + 1_000_003 * (trainer.current_epoch + 1) + trainer.global_rank
        torch.manual_seed(mixed)
        numpy.random.seed(mixed % 2**32)
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch; Lightning has validated by now."""
        if self.run is None or not trainer.is_global_zero:
            return
        measured = {key: float(value) for key, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + 1
        for split in ("train", "val"):
            mine = {
                k.partition("_")[2]: v for k, v in measured.items() if k.startswith(f"{split}_")
            }
            if split == "train":
                mine["lr"] = self.lr
                link = getattr(getattr(pl_module, "criterion", None), "link", None)
                mine |= {key: getattr(link, key) for key in ("k",) if hasattr(link, key)}
            self.run.log(epoch=epoch, split=split, **mine)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remember it: Lightning turns Ctrl-C into an exit."""
        self.stopped_by = exception
