"""A comparison from a task to its verdict and report; every host's command and `--loss auto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlo_core.compare.command import AUTO, CompareOptions
from rlo_core.compare.report import write_comparison
from rlo_core.compare.search import Search, SearchOptions
from rlo_core.compare.study import open_study
from rlo_core.compare.task import Task
from rlo_core.compare.verdict import verdict_of
from rlo_core.files import write_json

VERDICT, REPORT = "verdict.json", "report.html"


def compare(
    task: Task,
    options: CompareOptions,
    *,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare losses on a task, write `verdict.json` and `report.html`, return the verdict.

    Args:
        task: The host's data and recipe.
        options: Losses, budget, criterion, storage.
        out: The folder of the comparison; with what is there already it is gone on with.
        say: Is given a line for each run.

    Raises:
        RLOError: a loss that the host cannot train with, a budget that is too small, a study that
            was begun otherwise, a database that fails. What was measured is kept.
    """
    losses = options.candidates()
    criterion = options.criterion or task.criterion
    for loss in losses:
        task.check(loss)
    search = SearchOptions(
        losses=losses,
        seeds=options.seeds,
        criterion=criterion,
        trials=options.trials,
        minutes=options.minutes,
    )
    setup = {
        "host": task.host,
        "task": task.describe(),
        "losses": list(losses),
        task.rate_name: list(task.rates),
        "criterion": criterion,
    }
    where = options.storage or str(out)
    study = open_study(out, storage=options.storage, name=options.study or out.name, setup=setup)
    runs = Search(task, study, search, where=where, say=say).run()
    verdict = verdict_of(runs, task, search)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / VERDICT, verdict)
    write_comparison(runs, verdict, task, out / REPORT)
    return verdict


def choose(
    task: Task, *, out: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Return the verdict of a small comparison: what `--loss auto` of a trainer does."""
    return compare(task, CompareOptions(**AUTO), out=out, say=say)  # type: ignore[arg-type]
