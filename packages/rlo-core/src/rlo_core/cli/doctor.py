"""`rlo doctor`: does every plugin and every host import, and are its versions supported?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

from packaging.specifiers import SpecifierSet

from rlo_core.demo.parts import DEMO_GROUP
from rlo_core.errors import RLOError
from rlo_core.hosts import host_entries, load_host
from rlo_core.registry import available_losses, load_factory, package_of


@dataclass(frozen=True)
class Check:
    """One plugin, looked at: `detail` has the versions, or why it fails."""

    kind: str
    name: str
    package: str
    ok: bool
    detail: str


def run_checks() -> list[Check]:
    """Import every loss, every host with its command, and every part of the demo, each alone."""
    losses = [_loss(name, package) for name, package in available_losses().items()]
    hosts = [_host(name, entry) for name, entry in host_entries().items()]
    parts = [_part(entry) for entry in sorted(entry_points(group=DEMO_GROUP))]
    return [*losses, *hosts, *parts]


def _loss(name: str, package: str) -> Check:
    try:
        factory = load_factory(name)
    except RLOError as error:
        return Check("loss", name, package, False, str(error))
    return Check("loss", name, package, True, getattr(factory, "formula", ""))


def _part(entry: EntryPoint) -> Check:
    try:
        entry.load()
    except Exception as error:
        return Check("demo", entry.name, package_of(entry), False, _reason(error))
    return Check("demo", entry.name, package_of(entry), True, entry.value)


def _host(name: str, entry: EntryPoint) -> Check:
    package = package_of(entry)
    try:
        host = load_host(name)
    except RLOError as error:
        return Check("host", name, package, False, str(error))
    found, wrong = _versions(host.requires)
    extra, extra_wrong = _versions(host.optional, optional=True)
    detail = ", ".join([*found, *extra])
    if wrong or extra_wrong:
        return Check("host", name, package, False, ", ".join([*wrong, *extra_wrong]))
    try:
        host.load_command()
    except Exception as error:
        reason = f"{host.command} failed to import ({_reason(error)})"
        return Check("host", name, package, False, reason)
    return Check("host", name, package, True, detail)


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


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
