"""The `rlo-stylegan` command. Importing this module imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rlo_core.cli.groups import FriendlyGroup, format_table

if TYPE_CHECKING:
    from rlo_stylegan.layers import Layer
    from rlo_stylegan.patching import Change

_FOLDER = click.Path(path_type=Path)
_checkout = click.argument("checkout", type=_FOLDER)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_dry_run = click.option(
    "--dry-run", "--dry_run", "dry_run", is_flag=True, help="Say what would change; write nothing."
)
_diff = click.option("--diff", is_flag=True, help="Print the change as a diff; write nothing.")


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlo-stylegan", prog_name="rlo-stylegan")
def main() -> None:
    """The rooted loss in StyleGAN2-ADA and its relatives, without touching a line by hand."""


@main.command()
@_checkout
@click.option("--compat", is_flag=True, help="Make the repairs of `doctor --compat` as well.")
@_dry_run
@_diff
@_json
def apply(checkout: Path, compat: bool, dry_run: bool, diff: bool, as_json: bool) -> None:
    """Give CHECKOUT's train.py the options --loss, --kparam and --mparam.

    Two files change, training/loss.py and train.py; `revert` gives every byte back. The default of
    --loss is ce, which is the original loss bit for bit.
    """
    from rlo_stylegan.patching import apply as apply_to

    change = apply_to(checkout, compat=compat, dry_run=dry_run or diff)
    done = f"now: python {change.checkout / 'train.py'} --loss rlo --kparam 2 ..."
    _show(change, "apply", dry_run, diff, as_json, done)


@main.command()
@_checkout
@click.option(
    "--only",
    type=click.Choice(["loss", "compat"]),
    help="Take back one of the two; otherwise both.",
)
@_dry_run
@_diff
@_json
def revert(checkout: Path, only: Layer | None, dry_run: bool, diff: bool, as_json: bool) -> None:
    """Give back every byte that `apply` and `doctor --compat` changed."""
    from rlo_stylegan.patching import revert as revert_in

    change = revert_in(checkout, only=only, dry_run=dry_run or diff)
    left = ", ".join(change.layers)
    done = f"left in force: {left}" if left else "the checkout is as it was"
    _show(change, "revert", dry_run, diff, as_json, done)


def _show(change: Change, verb: str, dry_run: bool, diff: bool, as_json: bool, done: str) -> None:
    """Print what was done to a checkout, or would be."""
    if as_json:
        document: dict[str, Any] = {
            "checkout": str(change.checkout),
            "family": change.family,
            "layers": list(change.layers),
            "files": list(change.files),
            "written": list(change.written),
        }
        click.echo(json.dumps(document | ({"diff": change.diff} if diff else {}), indent=2))
        return
    at = f"{change.checkout} ({change.family})"
    if diff:
        click.echo(change.diff, nl=False)
    elif not change.files:
        click.echo(f"nothing to {verb} in {at}")
    elif dry_run:
        click.echo(f"would change in {at}: {', '.join(change.files)}")
    else:
        click.echo(f"changed in {at}: {', '.join(change.written)}")
        click.echo(done)


@main.command()
@_checkout
@_json
def status(checkout: Path, as_json: bool) -> None:
    """Say what is in force in CHECKOUT, and whether its files are as they were left."""
    from rlo_stylegan.checkout import find_checkout
    from rlo_stylegan.ledger import Ledger

    found = find_checkout(checkout)
    ledger = Ledger.load(found.root)
    document: dict[str, Any] = {
        "checkout": str(found.root),
        "family": found.family(),
        "layers": list(ledger.layers),
        "files": sorted(ledger.files),
        "changed": ledger.changed(),
        "interrupted": ledger.coming is not None,
        "not_reached": ledger.pending(),
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    layers = ", ".join(ledger.layers) if ledger.layers else "nothing"
    click.echo(f"{found.root} ({found.family()}): {layers} in force")
    for name in sorted(ledger.files):
        click.echo(f"  {name}{'  edited since' if name in document['changed'] else ''}")
    if ledger.coming is not None:
        left = ", ".join(document["not_reached"]) or "none"
        click.echo(f"a change was interrupted (files not reached: {left}); run apply or revert")


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script", type=_FOLDER)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(script: Path, arguments: tuple[str, ...]) -> None:
    """Run SCRIPT, a checkout's train.py, with --loss, --kparam and --mparam; change no file of it.

    Everything after SCRIPT is the script's own: `rlo-stylegan train CHECKOUT/train.py --help`.
    """
    from rlo_stylegan.launch import train as launch

    launch(script, arguments)


@main.command()
@_checkout
@click.option(
    "--compat", is_flag=True, help="Make the repairs; `revert --only compat` undoes them."
)
@_dry_run
@_diff
@_json
@click.pass_context
def doctor(
    ctx: click.Context, checkout: Path, compat: bool, dry_run: bool, diff: bool, as_json: bool
) -> None:
    """List what in CHECKOUT does not run on the installed torch and Python.

    Exit status 1 if something would stop a training run.
    """
    from rlo_stylegan.checkout import find_checkout
    from rlo_stylegan.doctor import examine
    from rlo_stylegan.ledger import Ledger
    from rlo_stylegan.patching import bring

    found = find_checkout(checkout)
    if compat or diff or dry_run:
        layers = {*Ledger.load(found.root).layers, "compat"}
        change = bring(found, layers, dry_run=dry_run or diff)
        done = "`rlo-stylegan revert --only compat` undoes it"
        _show(change, "repair", dry_run, diff, as_json, done)
        return
    findings = examine(found)
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    elif findings:
        rows = [("", "where", "what", "--compat")]
        rows += [(f.level, f.where, f.what, f.repair) for f in findings]
        click.echo(format_table(rows))
    else:
        click.echo(f"nothing found in {found.root} ({found.family()})")
    if any(finding.level == "stops" for finding in findings):
        ctx.exit(1)


@main.command()
@click.argument(
    "runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@click.option("--title", help="The heading of the page.")
@click.option(
    "--png",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for the curves as PNG.",
)
@_json
def report(
    runs: tuple[Path, ...], out: Path, title: str | None, png: Path | None, as_json: bool
) -> None:
    """Draw losses, scores and FID curves of GAN runs, or of folders of runs, on one page."""
    from rlo_stylegan.report import report_runs

    summaries = report_runs(runs, out, title=title, pictures=png)
    if as_json:
        click.echo(json.dumps({"report": str(out), "runs": summaries}, indent=2))
        return
    click.echo(f"wrote {out}")
