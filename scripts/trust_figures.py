"""Bring the tables of docs/trust.md up to date with the files of results they come from.

    python scripts/trust_figures.py [--write]

Without `--write` it prints the page and exits with 1 if the page in the repository is another.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "trust.md"
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the first line of a file of results, and the others."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    header, *records = map(json.loads, lines)
    return header, records


def torture_table() -> str:
    """Return the table of what was stopped, and how often it held."""
    header, records = read("torture")
    rows = ["| trial | tried | held |", "|---|---|---|"]
    rows += [f"| {one['trial']} | {one['tried']} | {one['held']} |" for one in records]
    end = (
        f"{header['minutes']:g} minutes, seed {header['seed']}, torch {header['versions']['torch']}"
    )
    return "\n".join([*rows, "", f"{end}."])


def mutants_table() -> str:
    """Return the table of what was broken, and how often a test saw it."""
    header, records = read("mutants")
    rows = ["| package | tried | caught | share |", "|---|---|---|---|"]
    for package in dict.fromkeys(one["package"] for one in records):
        own = [one for one in records if one["package"] == package and one["caught"] is not None]
        caught = sum(one["caught"] for one in own)
        rows.append(f"| {package} | {len(own)} | {caught} | {caught / len(own):.0%} |")
    return "\n".join([*rows, "", f"Seed {header['seed']}, torch {header['versions']['torch']}."])


TABLES = {"torture": torture_table, "mutants": mutants_table}


def page() -> str:
    """Return the page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        made = table()
        text, count = re.subn(
            block, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL
        )
        assert count == 1, name
    return text


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    made = page()
    if parser.parse_args().write:
        PAGE.write_text(made, encoding="utf-8")
        return
    print(made, end="")
    sys.exit(made != PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
