"""The loggers besides the run's own files: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from rlo_timm.trainer.settings import TrainSettings

PROJECT = "rlo-timm"


def make_loggers(settings: TrainSettings, folder: Path) -> list[Logger]:
    """Return the loggers that the settings name; TensorBoard only where it is installed."""
    made: list[Logger] = []
    for name in settings.loggers():
        if name == "tensorboard":
            with contextlib.suppress(ModuleNotFoundError):  # an extra: rlo-timm[tensorboard]
                made.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        elif name == "wandb":
            made.append(WandbLogger(save_dir=str(folder), project=PROJECT, name=folder.name))
        else:
            made.append(TrackioLogger(folder.name, settings.to_dict()))
    return made


class TrackioLogger(Logger):
    """Lightning's logger for trackio, which keeps its runs on this machine.

    Args:
        run: The run's name.
        options: What it was told.
    """

    def __init__(self, run: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._name, self._options = run, dict(options)
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return PROJECT

    @property
    def version(self) -> str:
        """The run."""
        return self._name

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the options are known from the start."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log one epoch; the first one opens the run."""
        import trackio  # type: ignore[import-not-found, unused-ignore]

        if self._run is None:
            self._run = trackio.init(project=PROJECT, name=self._name, config=self._options)
        trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            import trackio  # type: ignore[import-not-found, unused-ignore]

            trackio.finish()
            self._run = None
