"""`rlo report`: one self-contained page from any number of runs.

Reads only `run.json` and `metrics.jsonl` (see `rlo_core.runs.record`). In the summary of a run a
number or a text is a column of the table of runs, and a list of mappings is a table of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError, RunError
from rlo_core.files import write_text
from rlo_core.runs.charts import colours, inline_svg, panel_chart, save_picture
from rlo_core.runs.curves import Panel, read_panels
from rlo_core.runs.record import read_run

MAX_PICTURES = 36
NOTES = "notes"
"""In a summary: for tables by their names, one sentence that says what to see in them."""
_RUN_COLUMNS = ("kind", "loss", "seed", "status", "seconds")


@dataclass
class Table:
    """Rows of text under a heading; `numeric` are the columns that hold numbers only."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    numeric: set[int] = field(default_factory=set)
    caption: str = ""
    note: str = ""


def table_of(
    name: str, records: Sequence[Mapping[str, Any]], caption: str = "", note: str = ""
) -> Table:
    """Return records as a table: the union of their keys, each number as its column asks, no gaps.

    Args:
        name: The heading.
        records: One mapping a row.
        caption: Which run they are of.
        note: One sentence below: what to see in the table.
    """
    columns = list(dict.fromkeys(key for record in records for key in record))
    values = [[record.get(column) for record in records] for column in columns]
    numeric = {i for i, column in enumerate(values) if all(v is None or _number(v) for v in column)}
    cells = [column_text(column) for column in values]
    return Table(
        name, columns, [list(row) for row in zip(*cells, strict=True)], numeric, caption, note
    )


def column_text(values: Sequence[Any]) -> list[str]:
    """Return a column's values as text: numbers with one number of decimals, gaps empty.

    As many decimals as give the smallest number four digits, but no more than the numbers came
    with, and no more than six digits in the largest: 97.78 and 97.5 become 97.78 and 97.50.
    """
    floats = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    sizes = [abs(v) for v in floats if v != 0.0]
    decimals = 0
    if sizes:
        wanted = 3 - math.floor(math.log10(min(sizes)))
        room = 5 - math.floor(math.log10(max(sizes)))
        decimals = max(0, min(wanted, room, max(map(_decimals, floats))))
    return [
        f"{v:,.{decimals}f}" if v in floats and isinstance(v, float) else _cell(v) for v in values
    ]


def _decimals(value: float) -> int:
    """Return the number of decimals that a number is written with."""
    text = f"{Decimal(repr(value)):f}"
    return len(text.partition(".")[2].rstrip("0"))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _tables(folders: Sequence[Path], documents: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows: list[dict[str, Any]] = []
    own: list[Table] = []
    for folder, document in zip(folders, documents, strict=True):
        row: dict[str, Any] = {"run": folder.resolve().name}
        row |= {name: document.get(name) for name in _RUN_COLUMNS if document.get(name) is not None}
        summary = document.get("summary") or {}
        notes = summary.get(NOTES)
        notes = notes if isinstance(notes, dict) else {}
        for key, value in summary.items():
            if key == NOTES:
                continue
            if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
                caption = folder.resolve().name if len(folders) > 1 else ""
                own.append(table_of(key, value, caption, notes.get(key, "")))
            elif isinstance(value, dict):
                row |= {f"{key} {inner}": v for inner, v in value.items() if _scalar(v)}
            elif _scalar(value):
                row[key] = value
        rows.append(row)
    if len(rows) == 1:  # one run reads better down than across, and fits any page
        lines = [[key, *column_text([value])] for key, value in rows[0].items()]
        return [*own, Table("Run", ["", "value"], lines)]
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
    started = sorted(d["started"] for d in documents if d.get("started"))
    machine, versions = first.get("machine") or {}, first.get("versions") or {}
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
