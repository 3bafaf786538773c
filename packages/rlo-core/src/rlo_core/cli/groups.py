"""Command groups that suggest names and refuse in one line, and the table they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from rlo_core.cli.failures import known_failure
from rlo_core.errors import RLOError
from rlo_core.hosts import available_hosts, load_host


class FriendlyGroup(click.Group):
    """A click group that prints a known failure as one line and exits with 1; interrupted, 130.

    Host packages build their command on it, so that all of them fail alike.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except Exception as error:
            line = known_failure(error)
            if line is None:
                raise
            raise click.ClickException(line) from error


class HostGroup(FriendlyGroup):
    """`rlo` itself: its own commands, and each installed host's, imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *available_hosts()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in available_hosts():
            return own
        try:
            return load_host(cmd_name).load_command()
        except RLOError as error:
            raise click.ClickException(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [
            (name, command.get_short_help_str(limit=formatter.width))
            for name in super().list_commands(ctx)
            if (command := super(HostGroup, self).get_command(ctx, name)) is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(own)
        hosts = []
        for name in available_hosts():
            try:
                hosts.append((name, load_host(name).summary))
            except RLOError as error:
                hosts.append((name, f"broken: {error}"))
        if hosts:
            with formatter.section("Hosts"):
                formatter.write_dl(hosts)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
