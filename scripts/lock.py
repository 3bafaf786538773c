"""Write constraints/dev.txt and dev-py310.txt: plain `name==version` lines, no addresses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLUTIONS = {"dev.txt": "3.11", "dev-py310.txt": "3.10"}


def resolve(python: str) -> list[str]:
    """Return the locked `name==version` lines for one Python version."""
    requirements = [
        str(ROOT / "packages" / package / "pyproject.toml")
        for package in ("rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
    ]
    command = [
        str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "--python-version",
        python, "--python-platform", "x86_64-manylinux_2_28", "--extra", "all",
        "--group", f"{ROOT / 'pyproject.toml'}:dev", "--group", f"{ROOT / 'pyproject.toml'}:docs",
        "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links",
        *requirements,
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    pins = [line for line in output.splitlines() if re.fullmatch(r"[\w.\-]+==[\w.\-+!]+", line)]
    tool = subprocess.run(
        [command[0], "--version"], check=True, capture_output=True, text=True
    ).stdout.split()[1]
    return sorted({*pins, f"uv=={tool}"} - {p for p in pins if p.startswith("rlo-")})


for name, python in RESOLUTIONS.items():
    path = ROOT / "constraints" / name
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(resolve(python)) + "\n")
    os.replace(temporary, path)
    print(f"{path.relative_to(ROOT)}: {len(path.read_text().splitlines())} packages")
