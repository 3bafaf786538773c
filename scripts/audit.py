"""What is known of the locked versions: vulnerabilities (pip-audit), and their licences.

    python scripts/audit.py [--licences-only] [--json]

Vulnerabilities are asked of the Python Packaging Advisory Database, which needs a network; the exit
status is 1 if one is known, or if a package states no licence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints" / ("dev.txt" if sys.version_info >= (3, 11) else "dev-py310.txt")

ELSEWHERE = {"cuda-toolkit"}
"""Without a word on it in the metadata: an empty package, which only asks for NVIDIA's others."""


@dataclass(frozen=True)
class Licence:
    """What a package states: "" where it states none, None where it is not installed."""

    name: str
    version: str
    licence: str | None


def licence_of(about: PackageMetadata) -> str:
    """Return the licence of a distribution: SPDX expression, else classifiers, else its field."""
    expression = about.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = about.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    if named:
        return ", ".join(named)
    field = str(about.get("License") or "").strip()
    return field.splitlines()[0].strip() if field else ""


def licences(lock: Path) -> list[Licence]:
    """Return the licence of each locked package, as its installed metadata has it."""
    found = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        try:
            licence: str | None = licence_of(metadata(name))
        except PackageNotFoundError:
            licence = None
        found.append(Licence(name, version, licence))
    return found


def known_vulnerabilities(lock: Path) -> int:
    """Print what pip-audit knows of the locked versions; return its exit status."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--no-deps"]
    return subprocess.run([*command, "--disable-pip", "-r", str(lock)], check=False).returncode


def main() -> None:
    """List licences, then ask for vulnerabilities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--licences-only", action="store_true", help="ask no database")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    found = licences(LOCK)
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            stated = "not installed" if one.licence is None else one.licence or "states no licence"
            print(f"{one.name}=={one.version}: {stated}")
    silent = [one.name for one in found if one.licence == "" and one.name not in ELSEWHERE]
    if silent:
        print(f"no licence is stated by {', '.join(silent)}", file=sys.stderr)
    status = 0 if options.licences_only else known_vulnerabilities(LOCK)
    sys.exit(1 if silent or status else 0)


if __name__ == "__main__":
    main()
