"""`report.html`: what was made, where its bytes are, where it errs, how it was tuned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.files import write_text
from rlo_core.runs.charts import PALETTE, colours, inline_svg, panel_chart
from rlo_core.runs.curves import read_panels
from rlo_core.runs.record import read_metrics, read_run
from rlo_core.runs.report import Table, table_of

from rlo_gptq.report.sizes import OTHER, by_records, byte_shares
from rlo_gptq.report.words import in_words

_MEASURES = {"objective": "objective", "held_out_kl": "KL divergence on held-out text"}


@dataclass(frozen=True)
class Cell:
    """A square of a map: the text in it, what it says when pointed at, and how strong it is."""

    text: str
    title: str
    strength: int | None


@dataclass(frozen=True)
class HeatMap:
    """Blocks by kinds of layers, one number each."""

    kinds: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str


def write_page(folder: Path, *, title: str) -> Path:
    """Write `report.html` into the folder of a finished run; it has no script and no address.

    Args:
        folder: With `run.json`, `metrics.jsonl` and the weight files.
        title: The heading.

    Raises:
        RunError: the folder holds no run.
        RLOError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RLOError("a report needs jinja2; pip install 'rlo-core[plot]'") from error
    document = read_run(folder)
    summary: Mapping[str, Any] = document.get("summary") or {}
    layers = [dict(row) for row in summary.get("layers_by_error") or []]
    records = [r for r in read_metrics(folder) if "layer" in r] or layers
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = files("rlo_gptq.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title,
        words=in_words(document, _settings(folder)),
        shares=_shares(byte_shares(folder) or by_records(records)),
        errors=error_map(layers),
        bits=bits_map(records),
        curves=_curves(folder),
        tables=_tables(layers, summary),
        document=json.dumps(document, indent=2),
    )
    return _written(folder / "report.html", page)


def _settings(folder: Path) -> Mapping[str, Any] | None:
    """Return the settings in the folder's config.json, if it has some."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        found = config["quantization_config"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _written(path: Path, page: str) -> Path:
    write_text(path, page)
    return path


def _shares(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(sizes.values()) or 1
    hues = dict(zip((k for k in sizes if k != OTHER), PALETTE * 4, strict=False))
    return [
        {
            "name": name,
            "bytes": _bytes(size),
            "percent": f"{100 * size / total:.1f} %",
            "width": f"{100 * size / total:.3f}",
            "colour": hues.get(name, "#8a93a1"),
        }
        for name, size in sizes.items()
        if size > 0
    ]


def error_map(layers: Sequence[Mapping[str, Any]]) -> HeatMap | None:
    """Return the proxy losses as a map, darker where they are larger, on a logarithmic scale."""
    values = {row["layer"]: float(row["proxy"]) for row in layers if _finite(row.get("proxy"))}
    positive = [value for value in values.values() if value > 0]
    if not positive:
        return None
    low, high = math.log(min(positive)), math.log(max(positive))

    def cell(layer: str, value: float) -> Cell:
        share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
        return Cell(f"{value:.2g}", f"{layer}: proxy loss {value:.4g}", round(8 + 84 * share))

    note = (
        "Relative error of each layer's output on the calibration text, "
        "tr((W - Q) H (W - Q)^T) / tr(W H W^T)"
        f": from {min(positive):.2g} (pale) to {max(positive):.2g} (strong), logarithmic."
    )
    return _map(values, cell, note)


def bits_map(records: Sequence[Mapping[str, Any]]) -> HeatMap | None:
    """Return the bits of the layers as a map, where they are not all the same."""
    values = {
        row["layer"]: float(row["bits"])
        for row in records
        if _finite(row.get("bits")) and not row.get("outside")
    }
    if len(set(values.values())) < 2:
        return None
    most = max(values.values())

    def cell(layer: str, value: float) -> Cell:
        return Cell(f"{value:g}", f"{layer}: {value:g} bits", round(8 + 84 * value / most))

    return _map(values, cell, "Bits of a weight in each layer.")


def _map(values: Mapping[str, float], cell: Any, note: str) -> HeatMap | None:
    places: dict[tuple[int, str], tuple[str, float]] = {}
    for layer, value in values.items():
        parts = layer.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            continue
        kind = ".".join(parts[number + 1 :])
        places[int(parts[number]), kind] = (layer, value)
    if not places:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in sorted(places, key=lambda p: _order(p[1]))))
    rows = []
    for block in sorted({block for block, _ in places}):
        cells = [
            cell(*places[block, kind]) if (block, kind) in places else Cell("", "", None)
            for kind in kinds
        ]
        rows.append((str(block), cells))
    short = [kind.rpartition(".")[2] for kind in kinds]
    shown = short if len(set(short)) == len(short) else kinds
    return HeatMap(shown, rows, note)


_KINDS = ("q", "k", "v", "qkv", "query", "o", "out", "dense", "gate", "up", "fc1", "down", "fc2")


def _order(kind: str) -> tuple[int, str]:
    """Return where a kind stands: in the order in which a block computes."""
    last = kind.rpartition(".")[2]
    first = last.partition("_")[0]
    return (_KINDS.index(first) if first in _KINDS else len(_KINDS), kind)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _curves(folder: Path) -> list[dict[str, str]]:
    """Return the curves of a tuning as pictures."""
    panels = [panel for panel in read_panels([folder]) if panel.measure in _MEASURES]
    colour = colours([name for panel in panels for name in panel.lines])
    return [
        {
            "title": _MEASURES[panel.measure],
            "svg": inline_svg(panel_chart(panel, colour), name=f"p{i}", title=panel.title),
        }
        for i, panel in enumerate(panels)
    ]


def _tables(layers: list[dict[str, Any]], summary: Mapping[str, Any]) -> list[Table]:
    named = {
        "Layers, the largest error first": layers,
        "Tuned blocks: error on held-out sequences": summary.get("tuned_blocks"),
        "Tuning: what was measured": summary.get("evaluations"),
    }
    return [
        table_of(name, rows)
        for name, rows in named.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]
