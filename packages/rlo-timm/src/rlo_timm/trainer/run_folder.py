"""The folder of a run: who writes it, what may be in it, how it begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml
from lightning.pytorch.loggers import Logger
from rlo_core.errors import RunError
from rlo_core.files import write_text
from rlo_core.runs.folder import LOCK_FILE, lock_folder, writer_of
from rlo_core.runs.record import METRICS_FILE, RUN_FILE, Run, read_run

from rlo_timm.trainer.build import Built
from rlo_timm.trainer.callbacks import CHECKPOINTS, METRICS_CSV
from rlo_timm.trainer.loggers import make_loggers
from rlo_timm.trainer.names import net_name
from rlo_timm.trainer.publish import MODEL_CONFIG, WEIGHTS
from rlo_timm.trainer.resuming import Resumed
from rlo_timm.trainer.settings import TrainSettings

CONFIG, REPORT = "config.yaml", "report.html"
_WRITTEN = (RUN_FILE, METRICS_FILE, METRICS_CSV, CONFIG, WEIGHTS, MODEL_CONFIG, REPORT)
_WRITTEN_FOLDERS = (CHECKPOINTS, "tensorboard")


@contextmanager
def writing(
    settings: TrainSettings | None,
    *,
    out: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    overwrite: bool,
    dry: bool,
) -> Iterator[Path]:
    """Keep the folder of a run for this process while the block runs, and yield it.

    In a run of several processes the first one keeps it for all.

    Args:
        settings: The options, for the folder's name where no other is given.
        out: The folder; if left out that of `resume`, else `runs/NET-TIME`.
        resume: The run folder to go on with.
        overwrite: Replace a run that is in `out`.
        dry: Nothing will be written, so nothing is kept.

    Raises:
        RunError: another process writes there, there is a run already, or none to go on with.
        OSError: the folder cannot be made or written.
    """
    if resume is not None:
        read_run(resume)
    folder = _named(settings or TrainSettings(), out if out is not None else resume)
    if dry or not is_first():
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise _is_there(folder)
    with lock_folder(folder):
        if resume is None or folder != Path(resume):
            if not overwrite and any(path.name != LOCK_FILE for path in folder.iterdir()):
                raise _is_there(folder)
            if resume is not None and (writer := writer_of(resume)) is not None:
                raise RunError(f"{str(resume)!r} is being written by {writer}; wait for it to end")
        yield folder


def _named(settings: TrainSettings, folder: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        return Path(folder)
    name = net_name(settings.net).replace(":", "-").replace("/", "-")
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _is_there(folder: Path) -> RunError:
    return RunError(
        f"{str(folder)!r} is there already; --overwrite replaces the run in it, "
        f"--resume {folder} goes on with it"
    )


class Begin:
    """Opens the run folder, once everything else stands.

    Args:
        built: What the run is made of.
        folder: The run folder, kept by `writing`.
        old: The run that is resumed.
        seed: The seed.
    """

    def __init__(self, built: Built, folder: Path, old: Resumed | None, seed: int) -> None:
        self.built, self.folder, self.old, self.seed = built, folder, old, seed

    def __call__(self) -> tuple[Run, list[Logger]]:
        settings = self.built.plan.settings
        if self.old is None:
            _clear(self.folder)
        elif self.folder != self.old.folder:
            _clear(self.folder)
            _copy(self.old.folder, self.folder)
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        assert settings.size is not None
        run = Run.create(
            self.folder,
            kind="timm train",
            loss=str(settings.spec()),
            options=settings.to_dict(),
            seed=self.seed,
            data=self.built.data.describe(settings.dataset, settings.size),
            resume=self.old is not None,
            known=None if self.old is None else {"epoch": self.old.epochs},
        )
        write_text(self.folder / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False))
        return run, make_loggers(settings, self.folder)


def _copy(old: Path, new: Path) -> None:
    """Copy what a run in another folder goes on from."""
    (new / CHECKPOINTS).mkdir(parents=True)
    for name in ("best.ckpt", "last.ckpt"):
        shutil.copyfile(old / CHECKPOINTS / name, new / CHECKPOINTS / name)
    if (old / METRICS_FILE).exists():
        shutil.copyfile(old / METRICS_FILE, new / METRICS_FILE)


def _clear(folder: Path) -> None:
    """Remove what a run in the folder has written, and nothing else."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for name in _WRITTEN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def is_first() -> bool:
    """Tell whether this is the first process of a run that has several."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
