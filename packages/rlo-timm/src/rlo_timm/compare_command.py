"""`rlo compare timm`: the options of `rlo-timm train`, and those of every comparison."""

from __future__ import annotations

from typing import Any

import click
from rlo_core.compare.command import NUMBERS, CompareOptions, borrow_options, compare_options

from rlo_timm.train_command import train

OWN = (
    "loss", "k", "m", "loss_schedule", "lr", "seed", "out", "overwrite", "config", "resume",
    "print_config", "fast_dev_run", "as_json", "noaug", "noamp", "nowandb", "logger", "wandb",
    "push",
)  # fmt: skip
"""Options of training that a comparison decides, or that one run of many has no use for."""


@click.command("timm")
@click.option(
    "--rate",
    "rates",
    type=NUMBERS,
    metavar="R,R,...",
    help="The grid of learning rates.  [default: the network's times 0.1, 0.3, 1, 3]",
)
@compare_options
@borrow_options(train, without=OWN)
def command(rates: tuple[float, ...] | None, compare: CompareOptions, **options: Any) -> None:
    """Compare losses on images.

    A run is one of `rlo-timm train`, measured on the validation images by the weights that it
    keeps: those of its best epoch.
    """
    from rlo_core.compare.command import run_command

    from rlo_timm.compare import TimmTask
    from rlo_timm.trainer.settings import TrainSettings

    given = {name: value for name, value in options.items() if value is not None}
    settings = TrainSettings.from_mapping(given, source="options")
    name = f"{settings.net}-{settings.dataset}".replace("/", "-").replace(":", "-").strip("-.")
    run_command(TimmTask(settings, rates=rates), compare, name=name)
