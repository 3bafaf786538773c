"""Images in a comparison of losses: one run of the trainer at a time."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from rlo_core.compare.measures import Held
from rlo_core.compare.task import DivergedError, Task
from rlo_core.registry import create_loss

from rlo_timm.trainer.data import Data, load_data
from rlo_timm.trainer.evaluate import open_model, predictions
from rlo_timm.trainer.fit import train
from rlo_timm.trainer.module import DivergedError as TrainingDivergedError
from rlo_timm.trainer.plan import make_plan
from rlo_timm.trainer.settings import TrainSettings

_SAME = (
    "loss",
    "k",
    "m",
    "loss_schedule",
    "lr",
    "seed",
    "workers",
    "device",
    "devices",
    "data_dir",
)
"""Settings that a comparison decides, or that do not change what is measured."""


class TimmTask(Task):
    """Training images and validation images under one recipe.

    Args:
        settings: The recipe; its loss, rate and seed are the comparison's.
        rates: Learning rates; None for 0.1, 0.3, 1 and 3 times the recipe's.

    Raises:
        RLOError: the settings cannot be trained with.
    """

    host: ClassVar[str] = "timm"

    def __init__(self, settings: TrainSettings, *, rates: tuple[float, ...] | None = None) -> None:
        plain = dataclasses.replace(
            settings, loss="ce", k=None, m=None, loss_schedule=None, logger="none", wandb=False,
            push=None,
        )  # fmt: skip
        self.settings = make_plan(plain).settings
        usual = self.settings.lr
        assert usual is not None
        self.rates = tuple(sorted(rates or (usual * factor for factor in (0.1, 0.3, 1.0, 3.0))))
        self.default = len(self.rates) // 2

    @cached_property
    def data(self) -> Data:
        """The images, opened once."""
        return load_data(self.settings)

    def describe(self) -> dict[str, Any]:
        settings = {k: v for k, v in self.settings.to_dict().items() if k not in _SAME}
        assert self.settings.size is not None
        data = self.data.describe(self.settings.dataset, self.settings.size)
        return {"data": [self.settings.dataset, data.get("fingerprint")], "settings": settings}

    def check(self, loss: str) -> None:
        create_loss(loss)
        make_plan(dataclasses.replace(self.settings, loss=loss))

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            settings = dataclasses.replace(self.settings, loss=loss, lr=rate, seed=seed)
            try:
                train(settings, out=folder)
            except TrainingDivergedError as error:
                raise DivergedError(str(error)) from error
            net = open_model(str(folder))
        held = Held()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.settings.device == "cpu":
            device = torch.device("cpu")
        for logits, labels in predictions(
            net, self.data.val, batch_size=self.settings.batch_size,
            workers=self.settings.workers, device=device,
        ):  # fmt: skip
            held.update(logits, labels)
        return held.result()

    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        settings = dataclasses.replace(self.settings, loss=loss, lr=rate)
        result = dataclasses.asdict(train(settings, out=out, overwrite=True))
        return {**result, "run": str(out)}
