"""The `rlo` command, and the click group that host packages build theirs on."""

from rlo_core.cli.groups import FriendlyGroup

__all__ = ["FriendlyGroup"]
