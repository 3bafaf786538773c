"""`rlo demo`: parts that train, compare or quantize something real in a minute or two.

A package adds a part with an entry point in the group `rlo_core.demos` that names a callable

    part(run_dir: Path, *, console: rich.console.Console) -> dict

It writes its run (`rlo_core.runs.record.Run`) into `run_dir`, shows its progress and its table on
`console`, and returns the summary that it gave `Run.finish`: numbers, tables (lists of mappings,
under the heading that they have on the page), and, if it likes, `title` and `notes`, for a table's
heading the sentence that says what to see in it. Data has to come with the
dependencies: a part downloads nothing. A part that cannot run here raises `RLOError` with the
reason, and is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.errors import PluginError, RLOError, SpecError
from rlo_core.plugins import DEMOS, find_plugins, load_plugin, package_of, unknown_name
from rlo_core.runs.record import Run, read_metrics
from rlo_core.runs.report import NOTES

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "title"
"""In a part's summary: what the part is called on the page, in words."""


def demo_parts() -> list[str]:
    """Return the names of the parts, core's own first; imports nothing."""

    def foreign(name: str) -> bool:
        return not any(package_of(e).startswith("rlo-core ") for e in found[name])

    found = find_plugins(DEMOS)
    return sorted(found, key=lambda name: (foreign(name), name))


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
            raise SpecError(unknown_name(DEMOS.kind, name, known))
    chosen = list(parts) or known
    run = Run.create(folder, kind="demo", options={"parts": chosen})
    summaries: dict[str, Any] = {}
    for name in chosen:
        started = time.monotonic()
        try:
            part = load_plugin(DEMOS, name)
            with _one_thread():
                summary = part(folder / name, console=console)
        except PluginError:
            raise
        except RLOError as error:
            console.print(f"{name}: left out, {error}")
            summaries[name] = {"skipped": str(error)}
            continue
        summaries[name] = {**summary, "seconds": round(time.monotonic() - started, 1)}
        # The whole demo in one folder: `rlo report FOLDER` draws all its parts.
        for record in read_metrics(folder / name):
            run.log(**{"part": summary.get(TITLE, name), **record})
    run.finish(**_merged(summaries))
    write_report([folder], folder / "report.html", title="rlo demo")
    write_pictures([folder], folder)
    return summaries


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: the parts' models are small, and threads would only wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merged(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of all parts: tables under their own names, the rest with the part's."""
    merged: dict[str, Any] = {NOTES: {}}
    for name, summary in summaries.items():
        title = summary.get(TITLE, name)
        for key, value in summary.items():
            if key == NOTES:
                merged[NOTES] |= value
            elif key != TITLE:
                merged[key if isinstance(value, list) else f"{title}: {key}"] = value
    return merged
