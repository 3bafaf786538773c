"""Host adapters: how a package that opens a host presents itself to `rlo`.

A host package has one entry point in the group `rlo_core.hosts`, named as the host and pointing at
a `Host`. The module that holds it imports neither torch nor the host, so that `rlo --help` and
`rlo doctor` stay quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import click

from rlo_core.errors import PluginError
from rlo_core.plugins import HOSTS, find_plugins, load_plugin, package_of


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
        """Import and return the click command.

        Raises:
            PluginError: it does not import.
        """
        module, _, attribute = self.command.partition(":")
        try:
            return cast("click.Command", getattr(importlib.import_module(module), attribute))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a host that calls sys.exit costs its own name only
            raise PluginError(
                f"host {self.name!r}: {self.command} failed to import "
                f"({type(error).__name__}: {error})"
            ) from error


def available_hosts() -> list[str]:
    """Return the names of the registered hosts, sorted; imports nothing."""
    return list(find_plugins(HOSTS))


def load_host(name: str) -> Host:
    """Import one host adapter.

    Raises:
        SpecError: no such name.
        PluginError: it does not import, two packages claim it, or it is no `Host`.
    """
    host = load_plugin(HOSTS, name)
    if not isinstance(host, Host):
        package = " and ".join(map(package_of, find_plugins(HOSTS)[name]))
        raise PluginError(f"host {name!r} from {package} must be a Host, got {type(host).__name__}")
    return host
