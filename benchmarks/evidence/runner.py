"""What the four evidence commands share: a YAML configuration in, resumable JSON lines out.

Each measurement has a key; a key that is in the results file is not measured again. The first line
of the file has the machine, the versions and the whole configuration, and a file is continued only
with the settings that it was begun with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click
import yaml
from rlo_core.errors import DataError, RunError
from rlo_core.files import write_text
from rlo_core.runs.record import machine, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "results"

WHAT_TO_RUN = ("groups", "tables", "seeds", "losses", "lr", "path_seeds_below")
"""What may change from one start to the next: each record names its own."""


class Results:
    """The JSON lines of one evidence command.

    Args:
        path: The file; made if it is not there.
        config: The configuration. What the records there depend on must be what they were
            measured with; what to run, and models and jobs without a record, may change, and
            the first line is brought up to date.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            whole = [line for line in lines[:-1] if line.strip()]
            if whole:
                header, *found = map(json.loads, whole)
                if settings_of(header["config"], found) != settings_of(config, found):
                    raise RunError(
                        f"{path.name} was begun with another configuration; "
                        "give another --out, or remove it to start anew"
                    )
                self.records = {record["key"]: record for record in found}
                changed = header["config"] != config
                if changed:
                    whole[0] = json.dumps({**header, "config": config}, default=str)
                if changed or lines[-1]:  # a line that was cut off is measured again
                    write_text(path, "\n".join(whole) + "\n")
                return
        header = {
            "evidence": path.stem,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "config": config,
        }
        write_text(path, json.dumps(header, default=str) + "\n")

    def measure(self, key: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of `key`: the one that is there, or that of a call of `function`."""
        if key not in self.records:
            record = {"key": key, **function()}
            with self.path.open("ab") as handle:  # one write: a line is whole or absent
                handle.write((json.dumps(record) + "\n").encode("utf-8"))
            self.records[key] = record
            click.echo(f"{datetime.now():%H:%M:%S} {key}", err=True)
        return self.records[key]


def settings_of(config: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the records depend on: no lists of what to run, no models and jobs unused."""
    used = {record.get(part) for record in records for part in ("model", "job")}
    kept = {key: value for key, value in config.items() if key not in WHAT_TO_RUN}
    for part in kept.keys() & {"models", "jobs"}:
        kept[part] = {
            name: {key: value for key, value in entry.items() if key not in WHAT_TO_RUN}
            for name, entry in kept[part].items()
            if name in used
        }
    return kept


def load_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the records of a results file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header, *records = (json.loads(line) for line in lines if line.strip())
    return header, records


def load_config(path: Path) -> dict[str, Any]:
    """Return a YAML configuration.

    Raises:
        RunError: the file is not a mapping.
    """
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise RunError(
            f"configuration must be a mapping, got {type(config).__name__} in {path.name}"
        )
    return config


def data_folder(name: str, given: str | None) -> Path:
    """Return the folder of a data set: `given`, or `../shared/data/NAME` beside the repository."""
    folder = Path(given) if given else ROOT.parent / "shared" / "data" / name
    if not folder.exists():
        raise DataError(f"{name} is not at {folder}; give --data FOLDER")
    return folder
