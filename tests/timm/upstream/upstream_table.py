"""The guide's table of what was run on timm's real train.py, made from a file of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "timm_upstream.jsonl"
PAGE = ROOT / "docs" / "guides" / "timm.md"
BEGIN, END = "<!-- train.py by tag: begin -->", "<!-- train.py by tag: end -->"


def read(file: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the rows by tag."""
    if not file.is_file():
        return {}
    return {row["tag"]: row for row in map(json.loads, file.read_text().splitlines())}


def row_of(tag: str, records: list[dict[str, Any]], versions: dict[str, str]) -> dict[str, Any]:
    """Return one row: what each loss path came to on this tag."""
    paths = [r for r in records if "relative_error" in r or r.get("upstream_fails")]
    passed = [r for r in paths if "relative_error" in r]
    return {
        "tag": tag,
        "paths": [r["run"] or "yaml, schedule, resume" for r in passed],
        "fail_without_us": [r["run"] for r in paths if r.get("upstream_fails")],
        "largest_relative_error": max((r["relative_error"] for r in passed), default=None),
        "bit_identical_without_loss": bool(records[-1].get("identical")),
        **versions,
    }


def write(row: dict[str, Any], file: Path = RESULTS, page: Path = PAGE) -> None:
    """Put a row into the results, in place of the tag's last one, and draw the page's table."""
    rows = {**read(file), row["tag"]: row}
    order = sorted(rows.values(), key=lambda r: _number(r["tag"]))
    file.write_text("".join(json.dumps(r) + "\n" for r in order))
    page.write_text(drawn(page.read_text(), order))


def drawn(text: str, rows: list[dict[str, Any]]) -> str:
    """Return a page with the table of `rows` between its two marks."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    lines = [
        "| timm | loss paths that agree | fail with and without us | largest relative error | "
        "bit-identical without `--loss` | torch |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = row["largest_relative_error"]
        lines.append(
            f"| {row['tag']} | {len(row['paths'])} | {', '.join(row['fail_without_us']) or '-'} | "
            f"{'-' if error is None else f'{error:.1e}'} | "
            f"{'yes' if row['bit_identical_without_loss'] else 'no'} | {row['torch']} |"
        )
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def _number(tag: str) -> tuple[int, ...]:
    if not tag.startswith("v"):
        return (99,)
    return tuple(int(part) for part in tag[1:].split("."))
