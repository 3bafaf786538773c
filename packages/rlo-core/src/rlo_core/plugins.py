"""Plug-ins of other packages, found by their entry points and loaded one at a time.

Listing reads package metadata only. A plug-in is imported when its name is asked for, alone, and
whatever it raises while it is imported, `SystemExit` included, costs only its own name.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

from rlo_core.errors import PluginError, SpecError


@dataclass(frozen=True)
class PluginGroup:
    """A kind of plug-in.

    Args:
        entry_points: The entry-point group in which packages register it.
        kind: What one of them is called in a message.
    """

    entry_points: str
    kind: str


LOSSES = PluginGroup("rlo_core.losses", "loss")
GATES = PluginGroup("rlo_core.gates", "gate")
HOSTS = PluginGroup("rlo_core.hosts", "host")
COMPARERS = PluginGroup("rlo_core.comparers", "comparison")
DEMOS = PluginGroup("rlo_core.demos", "demo part")
MODEL_LOADERS = PluginGroup("rlo_core.model_loaders", "model loader")
ADAPTER_INITIALIZERS = PluginGroup("rlo_core.adapter_initializers", "adapter initializer")
GROUPS: tuple[PluginGroup, ...] = (
    LOSSES,
    GATES,
    HOSTS,
    COMPARERS,
    DEMOS,
    MODEL_LOADERS,
    ADAPTER_INITIALIZERS,
)
"""All groups, as `rlo doctor` checks them."""


def package_of(entry: EntryPoint) -> str:
    """Return `name version` of the distribution that an entry point comes from."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"


def find_plugins(group: PluginGroup) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name, sorted; imports no plug-in.

    A name with several entry points is claimed by several packages.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group.entry_points):
        same = found.setdefault(entry.name, [])
        # The same distribution can be on sys.path twice (editable and built); that is no conflict.
        if not any(
            other.value == entry.value and package_of(other) == package_of(entry) for other in same
        ):
            same.append(entry)
    return dict(sorted(found.items()))


def load_plugin(group: PluginGroup, name: str) -> Any:
    """Import and return one plug-in.

    Raises:
        SpecError: there is no such name; a near one is suggested.
        PluginError: two packages claim it, or it does not import.
    """
    found = find_plugins(group)
    if name not in found:
        raise SpecError(unknown_name(group.kind, name, list(found)))
    entries = found[name]
    if len(entries) > 1:
        raise PluginError(
            f"{group.kind} {name!r} is registered by {' and by '.join(map(package_of, entries))}; "
            "uninstall one of them"
        )
    return import_plugin(group, entries[0])


def import_plugin(group: PluginGroup, entry: EntryPoint) -> Any:
    """Import what one entry point names.

    Raises:
        PluginError: it does not import; names the package and the reason.
    """
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in that calls sys.exit costs its own name only
        raise PluginError(
            f"{group.kind} {entry.name!r} from {package_of(entry)} failed to import "
            f"({type(error).__name__}: {error}); `rlo doctor` checks every plugin"
        ) from error


def unknown_name(kind: str, name: str, available: Sequence[str]) -> str:
    """Return the message for a name that is not registered, with the nearest one that is."""
    close = difflib.get_close_matches(name, available, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return (
        f"unknown {kind} {name!r}{hint} available: {', '.join(available) or 'none'} "
        f"(rlo-core {version('rlo-core')})"
    )
