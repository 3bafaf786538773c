"""Pictures of curves with matplotlib, for a page that may be light or dark.

An inline SVG draws its text and axes in `currentColor`, so it follows the page; a PNG is on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.errors import RLOError
from rlo_core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlo_core.runs.curves import Panel

# Eight hues that keep a contrast of at least 3 on white and on #16181d, told apart by the
# colour-blind.
PALETTE = (
    "#3b82d6",
    "#d9653b",
    "#2a9d6f",
    "#b65fc4",
    "#b08a1e",
    "#d14d72",
    "#5f8f9e",
    "#8a7361",
)
_INK = "#0a0b0c"  # stands for currentColor until the SVG is text
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a measurement may be named with a $
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of `columns` axes side by side, in inches; it touches no global state.

    Raises:
        RLOError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RLOError("pictures need matplotlib; pip install 'rlo-core[plot]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def inline_svg(figure: Figure, *, name: str, title: str) -> str:
    """Return the figure as an `<svg>` element that follows the colour of the text around it.

    Args:
        figure: The figure.
        name: Makes the ids inside the SVG differ from those of other pictures on the page.
        title: What the picture shows, for a reader who cannot see it.
    """
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(_INK, "currentColor")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib numbers its groups anew in each picture; on one page an id may occur once.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    opening, _, rest = svg.partition(">")
    return f'{opening} role="img"><title>{html.escape(title)}</title>{rest}'


def save_picture(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG or SVG, by the ending of `path`, on white.

    Raises:
        RLOError: another ending.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise RLOError(f"a picture must end in .png or .svg, got {path.name!r}")
    import matplotlib

    with atomic_path(path) as temporary, matplotlib.rc_context(_STYLE):
        figure.savefig(temporary, format=kind, dpi=160, facecolor="white")
    return path


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, the same for a name in all pictures of a page."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def panel_chart(panel: Panel, colour: Mapping[str, str], *, legend: bool = False) -> Figure:
    """Draw one panel: a line for each loss, with a band over its seeds."""
    figure, (ax,) = new_figure(5.0, 3.1)
    from matplotlib.ticker import MaxNLocator

    for name, line in panel.lines.items():
        x, mean, low, high = line.band()
        ax.plot(x, mean, color=colour[name], label=name, linewidth=1.6)
        if len(line.members) > 1:
            ax.fill_between(x, low, high, color=colour[name], alpha=0.15, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # epochs, steps and blocks are whole
    ax.set_xlabel(panel.index)
    ax.set_ylabel(panel.measure)
    if legend:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            ax.set_title(panel.title, fontsize=10)
            ax.legend(fontsize=8)
    return figure
