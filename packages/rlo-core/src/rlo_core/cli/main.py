"""The `rlo` command. Importing this module imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rlo_core import __version__
from rlo_core.cli.groups import HostGroup, format_table
from rlo_core.compare.command import compare
from rlo_core.errors import RLOError


@click.group(cls=HostGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlo")
def main() -> None:
    """Rooted logistic objectives: the training objective as a plug-in."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def losses(as_json: bool) -> None:
    """List the registered losses, their options and formulas."""
    from rlo_core.registry import available_losses, load_factory, loss_options

    rows: list[dict[str, Any]] = []
    for name, package in available_losses().items():
        row: dict[str, Any] = {"name": name, "package": package}
        try:
            row["options"] = {key: p.default for key, p in loss_options(name).items()}
            row["formula"] = getattr(load_factory(name), "formula", "")
        except RLOError as error:
            row["error"] = str(error)
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    table = [("name", "package", "formula", "options")]
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row.get("options", {}).items())
        table.append(
            (row["name"], row["package"], row.get("formula", row.get("error", "")), options)
        )
    click.echo(format_table(table))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """Check every plugin and host: does it import, are versions supported.

    Exits with 1 if one of them fails.
    """
    from dataclasses import asdict

    from rlo_core.cli.doctor import run_checks

    checks = run_checks()
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) for check in checks]}, indent=2))
    else:
        rows = [("", "name", "package", "", "detail")]
        rows += [
            (check.kind, check.name, check.package, "ok" if check.ok else "FAILED", check.detail)
            for check in checks
        ]
        click.echo(format_table(rows))
    if not all(check.ok for check in checks):
        sys.exit(1)


@main.command()
@click.argument("losses", metavar="[LOSS]...", nargs=-1)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("links.png"),
    show_default=True,
    help="The picture to write, .png or .svg.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plot(losses: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Draw value and slope of losses.

    For instance `rlo plot ce rlo:k=8 rlo-convex`; all of them where none is named.
    """
    from rlo_core.cli.plot_links import plot_links

    drawn = plot_links(losses, out)
    click.echo(json.dumps({"picture": str(out), "losses": drawn}) if as_json else f"wrote {out}")


@main.command()
@click.argument(
    "folders",
    metavar="RUN...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page to write.  [default: RUN/report.html, or report.html here for several runs]",
)
@click.option("--title", help="The heading of the page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def report(folders: tuple[Path, ...], out: Path | None, title: str | None, as_json: bool) -> None:
    """Render runs as one page.

    A run is a folder with run.json and metrics.jsonl, as every host writes it.
    """
    from rlo_core.runs.report import write_report

    target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    write_report(folders, target, title=title)
    click.echo(json.dumps({"report": str(target)}) if as_json else f"wrote {target}")


@main.command()
@click.argument("parts", metavar="[PART]...", nargs=-1)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="The folder for the run, the pictures and report.html.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def demo(parts: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Train, compare and quantize real things, without a download.

    Each installed package may add a PART; all of them run where none is named.
    """
    from rlo_core.demo.parts import run_demo

    summaries = run_demo(out, parts=parts)
    if as_json:
        click.echo(json.dumps({"folder": str(out), "parts": summaries}, indent=2, default=str))
    else:
        click.echo(f"wrote {out / 'report.html'}")


main.add_command(compare)
