"""The `rlo-stylegan` command."""

from __future__ import annotations

import click
from rlo_core.cli import FriendlyGroup


@click.group(cls=FriendlyGroup)
def main() -> None:
    """Placeholder group, replaced by this package's own commands."""
