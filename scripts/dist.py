"""Build the five wheels into dist/ and try them as a user would: installed by name, elsewhere.

    python scripts/dist.py [--keep-env FOLDER]

The environment that they are installed into sees the wheels in dist/ and, for everything else, the
packages of the environment that runs this script. So what is tested is what the wheels hold and
say: a file that is missing, an entry point that does not load, a dependency nobody can have.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from sbom import write_bill

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
# What an editable install of ours leaves among the dependencies, and pip itself.
OURS = ("rlo_", "rlo-", "__editable__", "_editable", "pip")
COMMANDS = ("rlo", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
CHECK = """
import importlib, importlib.metadata, sys
from pathlib import Path
for name in sys.argv[1:]:
    module = importlib.import_module(name.replace("-", "_"))
    home = Path(module.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{name} is imported from {home}"
    assert (home.parent / "py.typed").exists(), f"{name} has no py.typed"
    distribution = importlib.metadata.distribution(name)
    for entry in distribution.entry_points:
        entry.load()
    print(name, distribution.version, len(list(distribution.entry_points)), "entry points load")
"""


def build(folder: Path) -> list[Path]:
    """Build the wheels into `folder`, which loses the wheels that it had; return them."""
    folder.mkdir(exist_ok=True)
    for old in [*folder.glob("rlo_*.whl"), *folder.glob("rlo_*.cdx.json")]:
        old.unlink()
    for package in PACKAGES:
        subprocess.run(
            [
                sys.executable, "-m", "build", "--no-isolation", "--wheel",
                "--outdir", str(folder), str(ROOT / "packages" / package),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return sorted(folder.glob("rlo_*.whl"))


def clean_environment(folder: Path) -> Path:
    """Make an environment that has our dependencies and none of our packages; return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    ours = Path(sysconfig.get_path("purelib"))
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for entry in ours.iterdir():
        if entry.suffix != ".pth" and not entry.name.lower().startswith(OURS):
            (dependencies / entry.name).symlink_to(entry)
    # Pythons before 3.12 bring an old setuptools, which would hide that of the dependencies.
    quiet = ["--quiet", "--yes", "--disable-pip-version-check"]
    subprocess.run([str(python), "-m", "pip", "uninstall", *quiet, "setuptools"], check=True)
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def main() -> None:
    """Build, install by name, check imports, entry points and commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-env", type=Path, help="make the environment here and leave it")
    keep = parser.parse_args().keep_env
    dist = ROOT / "dist"
    wheels = build(dist)
    assert len(wheels) == len(PACKAGES), wheels
    with tempfile.TemporaryDirectory() as temporary:
        python = clean_environment(keep or Path(temporary) / "env")
        # `rlo-timm` by name, from that folder, brings `rlo-core` along: what an index will do.
        install = [
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-index", "--find-links", str(dist), "--no-cache-dir",
        ]  # fmt: skip
        subprocess.run([*install, *PACKAGES[1:]], check=True)
        subprocess.run([str(python), "-c", CHECK, *PACKAGES], check=True, cwd=temporary)
        for command in COMMANDS:
            subprocess.run(
                [str(python.parent / command), "--help"],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=temporary,
            )
    for wheel in wheels:
        print(f"dist/{wheel.name}")
        print(f"dist/{write_bill(wheel).name}")


if __name__ == "__main__":
    main()
