"""`rlo-stylegan report`: losses, scores and FID of GAN runs on one page, ce beside rlo."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlo_core.errors import RunError
from rlo_core.runs.report import write_pictures, write_report

from rlo_stylegan.record import write_record


def report_runs(
    runs: Sequence[Path], out: Path, *, title: str | None = None, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """Write a page of some GAN runs; the runs themselves are only read.

    Args:
        runs: Folders with `training_options.json` and `stats.jsonl`, or folders of such folders.
        out: The page.
        title: Its heading.
        pictures: A folder for the curves as PNG files.

    Returns:
        One summary for each run: its loss, the last values and the best of each metric.

    Raises:
        RunError: a folder holds no GAN run.
    """
    folders = [run for given in runs for run in _runs_in(given)]
    with tempfile.TemporaryDirectory() as temporary:
        copies = [Path(temporary) / str(i) / run.resolve().name for i, run in enumerate(folders)]
        summaries = [write_record(run, copy) for run, copy in zip(folders, copies, strict=True)]
        write_report(copies, out, title=title)
        if pictures is not None:
            write_pictures(copies, pictures)
    return summaries


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run, else the runs in it."""
    if (folder / "training_options.json").is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/training_options.json"))
    if not runs:
        raise RunError(
            f"no GAN run in {str(folder)!r}: training_options.json is neither there nor one "
            "folder below"
        )
    return runs
