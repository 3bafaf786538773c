"""`rlo doctor`: does every plugin and every host import, and are its versions supported?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from rlo_core.errors import RLOError
from rlo_core.hosts import load_host
from rlo_core.plugins import (
    GROUPS,
    HOSTS,
    LOSSES,
    PluginGroup,
    find_plugins,
    load_plugin,
    package_of,
)
from rlo_core.registry import load_factory


@dataclass(frozen=True)
class Check:
    """One plugin, looked at: `detail` has the versions, or why it fails."""

    kind: str
    name: str
    package: str
    ok: bool
    detail: str


def run_checks() -> list[Check]:
    """Import every plug-in of every group, each alone, and each host's command."""
    checks = []
    for group in GROUPS:
        for name, entries in find_plugins(group).items():
            package = " and ".join(map(package_of, entries))
            checks.append(_check(group, name, package, entries[0].value))
    return checks


def _check(group: PluginGroup, name: str, package: str, value: str) -> Check:
    kind = group.kind
    try:
        if group is LOSSES:
            formula = getattr(load_factory(name), "formula", "")
            return Check(kind, name, package, True, formula)
        if group is HOSTS:
            return _host(name, package)
        load_plugin(group, name)
    except RLOError as error:
        return Check(kind, name, package, False, str(error))
    return Check(kind, name, package, True, value)


def _host(name: str, package: str) -> Check:
    host = load_host(name)
    found, wrong = _versions(host.requires)
    extra, extra_wrong = _versions(host.optional, optional=True)
    if wrong or extra_wrong:
        return Check("host", name, package, False, ", ".join([*wrong, *extra_wrong]))
    host.load_command()
    return Check("host", name, package, True, ", ".join([*found, *extra]))


def _versions(
    requires: Mapping[str, str], *, optional: bool = False
) -> tuple[list[str], list[str]]:
    """Return what is right and what is wrong about the distributions that a host needs."""
    found: list[str] = []
    wrong: list[str] = []
    for distribution, specifier in requires.items():
        wanted = f" (needs {specifier})" if specifier else ""
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            (found if optional else wrong).append(f"{distribution} is not installed{wanted}")
            continue
        if SpecifierSet(specifier).contains(installed, prereleases=True):
            found.append(f"{distribution} {installed}{wanted}")
        else:
            wrong.append(f"{distribution} {installed} is not supported{wanted}")
    return found, wrong
