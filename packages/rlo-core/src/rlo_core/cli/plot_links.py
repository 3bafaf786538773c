"""`rlo plot`: value and slope of losses against the probability of the right class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlo_core.errors import SpecError
from rlo_core.registry import available_losses, create_loss, link_of
from rlo_core.runs.charts import colours, new_figure, save_picture

LOWEST_P = 0.01


def plot_links(specs: Sequence[str], path: Path) -> list[str]:
    """Draw the links of some losses; return the specs that were drawn.

    Args:
        specs: Spec strings; none means every registered loss that has a link.
        path: The picture to write, .png or .svg.

    Raises:
        SpecError: a loss that was asked for has no link.
    """
    chosen = {}
    for spec in specs or available_losses():
        link = link_of(create_loss(spec))
        if link is not None:
            chosen[spec] = link
        elif specs:
            raise SpecError(f"loss {spec!r} has no link, so it has no curve")
    figure, axes = new_figure(9.0, 3.8, columns=2)
    p = torch.linspace(LOWEST_P, 1.0, 400, dtype=torch.float64)
    ce = -p.log()
    colour = colours(list(chosen))
    for name, link in chosen.items():
        # Where two losses coincide, the dashes of the later let the earlier be seen.
        style = "--" if name.startswith(("gce", "dft")) else "-"
        for ax, y in zip(axes, (link.value(ce), link.slope(ce)), strict=True):
            ax.plot(p.tolist(), y.tolist(), style, color=colour[name], label=name, linewidth=1.7)
    for ax, title in zip(axes, ("loss", "slope: weight of the sample"), strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("probability of the right class")
        ax.set_xlim(0.0, 1.0)
        ax.set_ylim(bottom=0.0)
    axes[0].legend(fontsize=8)
    save_picture(figure, path)
    return list(chosen)
