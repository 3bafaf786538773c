"""What happens around an epoch: seeds, the run's files, its checkpoints."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from rlo_core.files import atomic_path, write_text
from rlo_core.runs.record import Run, read_metrics

from rlo_timm.trainer.loaders import Loaders
from rlo_timm.trainer.module import Classifier

CHECKPOINTS = "checkpoints"
METRICS_CSV = "metrics.csv"


class Epochs(Callback):
    """Seeds each epoch, and writes it to the run's files.

    Args:
        seed: Everything that an epoch draws depends on it and on the epoch alone.
        begin: Opens the run folder and its loggers; called when everything is built and a
            checkpoint is loaded, so that a run which cannot start leaves nothing, and a failed
            resume leaves the run alone. None writes nothing.
    """

    def __init__(self, seed: int, begin: Callable[[], tuple[Run, list[Logger]]] | None) -> None:
        self.seed = seed
        self.begin = begin
        self.run: Run | None = None
        self.stopped_by: BaseException | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin: Lightning leaves `on_train_epoch_start` out for the first epoch after a resume."""
        if self.begin is not None:
            self.run, trainer.loggers = self.begin()
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed: dropout and mixup do not depend on how the run came to this epoch."""
        loaders = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(loaders, Loaders)
        loaders.set_epoch(trainer.current_epoch)
        mixed = self.seed + 1_000_003 * (trainer.current_epoch + 1) + trainer.global_rank
        torch.manual_seed(mixed)
        numpy.random.seed(mixed % 2**32)

    def write(self, trainer: pl.Trainer, module: Classifier) -> None:
        """Write the epoch's numbers to metrics.jsonl, metrics.csv and the loggers."""
        epoch = trainer.current_epoch + 1
        link = getattr(module.criterion, "link", None)
        extra = {key: getattr(link, key) for key in ("k",) if hasattr(link, key)}
        for split in ("train", "val"):
            values = dict(module.measured.get(split, {}))
            if split == "train":
                values |= extra
            if self.run is not None:
                self.run.log(epoch=epoch, split=split, **values)
            for logger in trainer.loggers:
                logger.log_metrics({f"{split}/{k}": v for k, v in values.items()}, step=epoch)
        if self.run is not None:
            write_csv(self.run.folder)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remember it: Lightning turns Ctrl-C into an exit."""
        self.stopped_by = exception


class Savers(Checkpoint):
    """`last.ckpt` after each epoch, and `best.ckpt`, the first one of the highest top-1.

    An epoch is written to the run's files first, then saved: after a kill between the two, a resume
    drops its lines and does the epoch again.
    """

    def __init__(self, folder: Path, epochs: Epochs) -> None:
        self.folder = folder / CHECKPOINTS
        self.epochs = epochs
        self.best = -1.0

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, check, save: callbacks that save come after everything else of the epoch."""
        assert isinstance(pl_module, Classifier)
        if trainer.is_global_zero:
            self.epochs.write(trainer, pl_module)
        pl_module.check()
        acc1 = pl_module.measured["val"]["acc1"]
        better = acc1 > self.best
        self.best = max(self.best, acc1)
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / "last.ckpt")  # takes part; the first one writes
            return
        with atomic_path(self.folder / "last.ckpt") as temporary:
            trainer.save_checkpoint(temporary)
            if better:
                with atomic_path(self.folder / "best.ckpt") as copy:
                    shutil.copyfile(temporary, copy)


def write_csv(folder: Path) -> None:
    """Write `metrics.csv`, one line an epoch, from `metrics.jsonl`."""
    rows: dict[int, dict[str, object]] = {}
    for record in read_metrics(folder):
        row = rows.setdefault(int(record["epoch"]), {"epoch": record["epoch"]})
        split = record["split"]
        row |= {f"{split}_{k}": v for k, v in record.items() if k not in ("epoch", "split")}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_text(folder / METRICS_CSV, text.getvalue())
