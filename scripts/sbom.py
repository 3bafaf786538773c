"""Bills of materials of wheels, as CycloneDX 1.6 JSON, from what is installed and locked.

`scripts/dist.py` puts one beside each wheel: the wheel with its SHA-256, and everything that it
needs without extras, in the version that the tests ran with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from audit import licence_of
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed_by(name: str) -> dict[str, list[str]]:
    """Return everything that a distribution needs here, with what each of them needs itself.

    Args:
        name: An installed distribution.

    Returns:
        Canonical names to the names that they need without extras, `name` first.
    """
    found: dict[str, list[str]] = {}
    waiting = [(canonicalize_name(name), frozenset[str]())]
    while waiting:
        one, extras = waiting.pop(0)
        try:
            lines = distribution(one).requires or []
        except PackageNotFoundError:  # of another platform
            continue
        direct = found.setdefault(one, [])
        for wanted in map(Requirement, lines):
            marker = wanted.marker
            if marker and not any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                continue
            other = canonicalize_name(wanted.name)
            if other not in direct:
                direct.append(other)
                if other not in found:
                    waiting.append((other, frozenset(wanted.extras)))
    return found


def component_of(name: str, *, files: Iterable[Path] = ()) -> Component:
    """Return an installed distribution as a component, with the hashes of its files."""
    about = distribution(name)
    licence = licence_of(about.metadata)
    hashes = [
        HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(f.read_bytes()).hexdigest())
        for f in files
    ]
    return Component(
        type=ComponentType.LIBRARY,
        name=canonicalize_name(name),
        version=about.version,
        purl=PackageURL("pypi", None, canonicalize_name(name), about.version),
        bom_ref=f"{canonicalize_name(name)}=={about.version}",
        licenses=[LicenseFactory().make_from_string(licence)] if licence else (),
        hashes=hashes,
    )


def write_bill(wheel: Path) -> Path:
    """Write the bill of materials of a wheel beside it; return the file.

    Args:
        wheel: A wheel of a distribution that is installed here.
    """
    name = wheel.name.partition("-")[0]
    needed = needed_by(name)
    bill = Bom()
    components = {
        one: component_of(one, files=[wheel] if one == canonicalize_name(name) else ())
        for one in needed
    }
    bill.metadata.component = components[canonicalize_name(name)]
    for one, component in components.items():
        if one != canonicalize_name(name):
            bill.components.add(component)
    for one, others in needed.items():
        bill.register_dependency(
            components[one], [components[o] for o in others if o in components]
        )
    out = wheel.with_name(f"{wheel.name.removesuffix('.whl')}.cdx.json")
    writer = make_outputter(bill, OutputFormat.JSON, SchemaVersion.V1_6)
    writer.output_to_file(str(out), allow_overwrite=True, indent=2)
    return out
