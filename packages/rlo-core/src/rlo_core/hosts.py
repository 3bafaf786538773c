"""Host adapters: how a package that opens a host presents itself to `rlo`.

A host package has one entry point in the group `rlo_core.hosts`, named as the host and pointing at
a `Host`. The module that holds it imports neither torch nor the host, so that `rlo --help` and
`rlo doctor` stay quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import click

from rlo_core.errors import PluginError

HOST_GROUP = "rlo_core.hosts"


@dataclass(frozen=True)
class Host:
    """One host adapter.

    Args:
        name: The word after `rlo`, e.g. "timm".
        summary: One line for `rlo --help`.
        command: Where its click command is, "package.module:attribute"; imported when it is used.
        requires: Distributions that the host needs, with the supported range as a PEP 440
            specifier.
        optional: The same for distributions that only some of its features need.
    """

    name: str
    summary: str
    command: str
    requires: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)

    def load_command(self) -> click.Command:
        """Import and return the click command."""
        module, _, attribute = self.command.partition(":")
        return cast("click.Command", getattr(importlib.import_module(module), attribute))


def host_entries() -> dict[str, EntryPoint]:
    """Return the registered hosts by name; imports nothing."""
    return {entry.name: entry for entry in sorted(entry_points(group=HOST_GROUP))}


def load_host(name: str) -> Host:
    """Import one host adapter.

    Raises:
        PluginError: it does not import, or is no `Host`.
    """
    entry = host_entries()[name]
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"
    try:
        host = entry.load()
    except Exception as error:
        raise PluginError(
            f"host {name!r} from {package} failed to import ({type(error).__name__}: {error}); "
            "`rlo doctor` checks every plugin"
        ) from error
    if not isinstance(host, Host):
        raise PluginError(f"host {name!r} from {package} must be a Host, got {type(host).__name__}")
    return host
