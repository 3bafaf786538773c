"""`rlo report`: one self-contained page from any number of runs.

Reads only `run.json` and `metrics.jsonl` (see `rlo_core.runs.record`). In the summary of a run a
number or a text is a column of the table of runs, and a list of mappings is a table of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError, RunError
from rlo_core.files import write_text
from rlo_core.runs.charts import colours, inline_svg, panel_chart, save_picture
from rlo_core.runs.curves import Panel, read_panels
from rlo_core.runs.record import read_run

MAX_PICTURES = 36
_RUN_COLUMNS = ("kind", "loss", "seed", "status", "seconds")


@dataclass
class Table:
    """Rows of text under a heading; `numeric` are the columns that hold numbers only."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    numeric: set[int] = field(default_factory=set)
    caption: str = ""


def table_of(name: str, records: Sequence[Mapping[str, Any]], caption: str = "") -> Table:
    """Return records as a table: the union of their keys, numbers at four digits, gaps empty."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    values = [[record.get(column) for column in columns] for record in records]
    numeric = {
        i
        for i in range(len(columns))
        if all(
            row[i] is None or (isinstance(row[i], (int, float)) and not isinstance(row[i], bool))
            for row in values
        )
    }
    return Table(name, columns, [[_cell(v) for v in row] for row in values], numeric, caption)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _tables(folders: Sequence[Path], documents: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows: list[dict[str, Any]] = []
    own: list[Table] = []
    for folder, document in zip(folders, documents, strict=True):
        row: dict[str, Any] = {"run": folder.resolve().name}
        row |= {name: document.get(name) for name in _RUN_COLUMNS if document.get(name) is not None}
        for key, value in document.get("summary", {}).items():
            if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
                caption = folder.resolve().name if len(folders) > 1 else ""
                own.append(table_of(key, value, caption))
            elif isinstance(value, dict):
                row |= {f"{key} {inner}": v for inner, v in value.items() if _scalar(v)}
            elif _scalar(value):
                row[key] = value
        rows.append(row)
    return [*own, table_of("Runs", rows)]


def _scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or value is None


def _drawn(panels: Sequence[Panel]) -> tuple[list[Panel], dict[str, str]]:
    """Return the panels that fit on a page, and the colour of each line's name."""
    shown = list(panels)[:MAX_PICTURES]
    return shown, colours([name for panel in shown for name in panel.lines])


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Write one self-contained HTML page (light and dark, no script, no address) for some runs.

    Args:
        folders: Run folders, each with `run.json` and, where it measured something,
            `metrics.jsonl`.
        out: The page to write.
        title: Heading; the name of the run, or the number of runs, where it is left out.

    Returns:
        `out`.

    Raises:
        RunError: no folder is given, or one holds no run.
        RLOError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RLOError("a report needs jinja2; pip install 'rlo-core[plot]'") from error
    if not folders:
        raise RunError("a report needs at least one run folder")
    folders = [Path(folder) for folder in folders]
    documents = [read_run(folder) for folder in folders]
    panels = read_panels(folders)
    shown, colour = _drawn(panels)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = files("rlo_core.runs").joinpath("report.html.j2").read_text(encoding="utf-8")
    names = [folder.resolve().name for folder in folders]
    page = environment.from_string(template).render(
        title=title or (names[0] if len(names) == 1 else f"{len(names)} runs"),
        lead=_lead(documents),
        tables=_tables(folders, documents),
        pictures=[
            {
                "title": panel.title,
                "svg": inline_svg(panel_chart(panel, colour), name=f"p{i}", title=panel.title),
            }
            for i, panel in enumerate(shown)
        ],
        colours=colour,
        left_out=len(panels) - len(shown),
        runs=[
            {"name": name, "document": json.dumps(document, indent=2)}
            for name, document in zip(names, documents, strict=True)
        ],
    )
    write_text(out, page)
    return out


def _lead(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return where and when, in one line."""
    first = documents[0]
    started = sorted(d["started"] for d in documents if "started" in d)
    machine, versions = first.get("machine", {}), first.get("versions", {})
    known = [f"torch {versions[name]}" for name in ("torch",) if name in versions]
    known += [str(machine[name]) for name in ("gpu", "cpu") if machine.get(name)]
    known += [started[0][:10]] if started else []
    return ", ".join(known)


def write_pictures(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write every curve of some runs as a PNG in the folder `out`; return the files."""
    shown, colour = _drawn(read_panels([Path(folder) for folder in folders]))
    written = []
    for panel in shown:
        name = "-".join([*panel.labels, panel.measure]).lower()
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        written.append(save_picture(panel_chart(panel, colour, legend=True), out / f"{safe}.png"))
    return written
