"""The curve of sizes and predicted divergences: a picture, or a page with it and its table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.files import write_text
from rlo_core.runs.charts import PALETTE, inline_svg, new_figure, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f27; --paper: #fff; --rule: #d9dee6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ef; --paper: #16181d; --rule: #333a45; }}
}}
body {{ margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
svg {{ width: 100%; max-width: 44rem; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: right; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
{picture}
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</body>
</html>
"""
_LEAD = (
    "Predicted Kullback-Leibler divergence to the dense model's next token, in nats a token, of "
    "the best bits within each size; the points are models whose layers all have the same bits."
)


def write_curve(document: dict[str, Any], path: Path) -> Path:
    """Draw the curve of a `pareto` document into a .svg, .png or .html file.

    Raises:
        RLOError: matplotlib is not installed.
    """
    figure = _figure(document["curve"], document["uniform"])
    if path.suffix.lower() != ".html":
        return save_picture(figure, path)
    title = f"Sizes of {Path(str(document['model']).rstrip('/')).name}"
    names = [name for name in document["curve"][0] if name not in ("units", "bytes")]
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ("MB", *names))
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{v}</td>" for v in (f"{row['bytes'] / 1e6:.3f}", *_cells(row, names)))
        + "</tr>"
        for row in document["curve"]
    )
    page = _PAGE.format(
        title=html.escape(title),
        lead=_LEAD,
        picture=inline_svg(figure, name="pareto", title="Predicted divergence against size"),
        head=head,
        rows=rows,
    )
    write_text(path, page)
    return path


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names]


def _figure(curve: Sequence[dict[str, Any]], uniform: Sequence[dict[str, Any]]) -> Figure:
    figure, (axes,) = new_figure(6.4, 4.2)
    lines = (
        (curve, "-", "bits chosen for each layer"),
        (uniform, "o--", "the same bits everywhere"),
    )
    for colour, (rows, style, label) in zip(PALETTE, lines, strict=False):
        shown = [row for row in rows if row["predicted_kl"] > 0]
        x, y = [row["bytes"] / 1e6 for row in shown], [row["predicted_kl"] for row in shown]
        axes.plot(x, y, style, color=colour, label=label, markersize=4, linewidth=1.4)
    for row in uniform:
        if row["predicted_kl"] > 0:
            at = (row["bytes"] / 1e6, row["predicted_kl"])
            axes.annotate(
                f"{row['bits']} bits", at, xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    axes.set_yscale("log")
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("predicted KL divergence, nats a token")
    axes.legend(fontsize=8)
    return figure
