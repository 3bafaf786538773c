"""`rlo compare hf`: the options of `rlo-hf finetune`, and those of every comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rlo_core.compare.command import NUMBERS, CompareOptions, borrow_options, compare_options

from rlo_hf.cli import finetune

OWN = (
    "loss", "k", "m", "out", "learning_rate", "seed", "merge", "save", "no_save", "resume",
    "save_steps", "eval_only", "push", "dry_run", "as_json",
)  # fmt: skip
"""Options of finetuning that a comparison decides, or that one run of many has no use for."""


@click.command("hf")
@click.option("--rate", "rates", type=NUMBERS, metavar="R,R,...",
              help="The grid of peak learning rates.  [default: 1e-5,3e-5,1e-4,3e-4]")  # fmt: skip
@compare_options
@borrow_options(finetune, without=OWN)
def command(rates: tuple[float, ...] | None, compare: CompareOptions, **options: Any) -> None:
    """Compare losses for finetuning a causal language model.

    A run is one of `rlo-hf finetune`, measured on each held-out token. The criterion is the
    likelihood, unless --criterion says otherwise: text has no wrong labels.
    """
    from rlo_core.compare.command import run_command

    from rlo_hf.compare import HFTask
    from rlo_hf.finetuning.options import FinetuneOptions

    task = HFTask(FinetuneOptions(**options), rates=rates)
    run_command(
        task, compare, name=f"{Path(options['model']).stem}-{Path(options['dataset']).stem}"
    )
