"""Write constraints/dev.txt and dev-py310.txt, plain `name==version` lines, and their hashes.

    python scripts/lock.py            resolve anew, for both supported resolutions
    python scripts/lock.py --hashes   only the hashes of the versions that are locked

`dev.hashes.txt` and `dev-py310.hashes.txt` have the same lines with the SHA-256 of every file that
an index may give for them; `make install-hashed` installs nothing else. No file has an address.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLUTIONS = {"dev.txt": "3.11", "dev-py310.txt": "3.10"}
UV = str(Path(sys.executable).parent / "uv")
GROUPS = ("dev", "docs", "audit")


def compiled(python: str, *arguments: str, text: str = "") -> str:
    """Return what `uv pip compile` prints for one Python version."""
    command = [
        UV, "pip", "compile", "--quiet", "--python-version", python,
        "--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate",
        "--no-emit-index-url", "--no-emit-find-links", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, input=text, cwd=ROOT
    ).stdout


def resolve(python: str) -> list[str]:
    """Return the locked `name==version` lines for one Python version."""
    requirements = [
        str(ROOT / "packages" / package / "pyproject.toml")
        for package in ("rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
    ]
    groups = [word for name in GROUPS for word in ("--group", f"{ROOT / 'pyproject.toml'}:{name}")]
    output = compiled(python, "--extra", "all", *groups, *requirements)
    pins = [line for line in output.splitlines() if re.fullmatch(r"[\w.\-]+==[\w.\-+!]+", line)]
    tool = subprocess.run(
        [UV, "--version"], check=True, capture_output=True, text=True
    ).stdout.split()[1]
    return sorted({*pins, f"uv=={tool}"} - {p for p in pins if p.startswith("rlo-")})


def hashed(pins: str, python: str) -> str:
    """Return the same lines with the hashes of their files."""
    return compiled(python, "--generate-hashes", "--no-deps", "-", text=pins)


def write(path: Path, text: str) -> None:
    """Put a file in place whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    """Resolve, and hash what was resolved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hashes", action="store_true", help="keep the versions")
    keep = parser.parse_args().hashes
    for name, python in RESOLUTIONS.items():
        path = ROOT / "constraints" / name
        if not keep:
            write(path, "\n".join(resolve(python)) + "\n")
        pins = path.read_text()
        write(path.with_name(f"{path.stem}.hashes.txt"), hashed(pins, python))
        print(f"{path.relative_to(ROOT)}: {len(pins.splitlines())} packages, and their hashes")


if __name__ == "__main__":
    main()
