"""`rlo demo`: parts that train, compare or quantize something real in a minute or two.

A package adds a part with an entry point in the group `rlo_core.demos` that names a callable

    part(run_dir: Path, *, console: rich.console.Console) -> dict

It writes its run (`rlo_core.runs.record.Run`) into `run_dir`, shows its progress and its table on
`console`, and returns the summary that it gave `Run.finish`. Data has to come with the
dependencies: a part downloads nothing. A part that cannot run here raises `RLOError` with the
reason, and is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.errors import PluginError, RLOError, SpecError
from rlo_core.runs.record import Run, read_metrics

if TYPE_CHECKING:
    from rich.console import Console

DEMO_GROUP = "rlo_core.demos"


def demo_parts() -> dict[str, EntryPoint]:
    """Return the parts by name, core's own first; imports nothing."""
    found = sorted(
        entry_points(group=DEMO_GROUP),
        key=lambda entry: (entry.dist is None or entry.dist.name != "rlo-core", entry.name),
    )
    return {entry.name: entry for entry in found}


def run_demo(
    folder: Path, *, parts: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and write `run.json`, `metrics.jsonl`, the pictures and `report.html`.

    Args:
        folder: Where they go; each part's own run is in a folder inside it.
        parts: Which parts, by name; none given means all.
        console: Where progress and tables are shown; standard error when left out.

    Returns:
        For each part its summary, or `{"skipped": reason}`.

    Raises:
        SpecError: no part of that name.
        PluginError: a part does not import.
    """
    from rich.console import Console

    from rlo_core.runs.report import write_pictures, write_report

    console = console or Console(stderr=True)
    known = demo_parts()
    for name in parts:
        if name not in known:
            raise SpecError(f"unknown demo part {name!r}; available: {', '.join(known)}")
    chosen = list(parts) or list(known)
    run = Run.create(folder, kind="demo", options={"parts": chosen})
    summaries: dict[str, Any] = {}
    for name in chosen:
        started = time.monotonic()
        try:
            summary = _load(known[name])(folder / name, console=console)
        except PluginError:
            raise
        except RLOError as error:
            console.print(f"{name}: left out, {error}")
            summaries[name] = {"skipped": str(error)}
            continue
        summaries[name] = {**summary, "seconds": round(time.monotonic() - started, 1)}
        # The whole demo in one folder: `rlo report FOLDER` draws all its parts.
        for record in read_metrics(folder / name):
            run.log(**{"part": name, **record})
    run.finish(**_merged(summaries))
    write_report([folder], folder / "report.html", title="rlo demo")
    write_pictures([folder], folder)
    return summaries


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(
            f"demo part {entry.name!r} failed to import ({type(error).__name__}: {error}); "
            "`rlo doctor` checks every plugin"
        ) from error


def _merged(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of all parts: tables under their own names, the rest with the part's."""
    merged: dict[str, Any] = {}
    for name, summary in summaries.items():
        for key, value in summary.items():
            merged[key if isinstance(value, list) else f"{name} {key}"] = value
    return merged
