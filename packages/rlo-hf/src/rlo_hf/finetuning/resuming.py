"""A finetuning that was cut off goes on from its last checkpoint, with the same options only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rlo_core.errors import RunError
from rlo_core.runs.record import read_run

from rlo_hf.finetuning.options import FinetuneOptions

CHECKPOINTS = "checkpoints"


def last_checkpoint(out: Path) -> str:
    """Return the newest checkpoint of the run in a folder, or raise RunError if it has none."""
    found = sorted(
        (out / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    if not found:
        raise RunError(f"run {str(out)!r} has no checkpoint to resume from")
    return str(found[-1])


def check_same(out: Path, options: FinetuneOptions) -> None:
    """Raise RunError unless the run in the folder has these options."""
    saved = read_run(out).get("options", {})
    last_checkpoint(out)
    for name, value in asdict(options).items():
        if name in saved and saved[name] != value:
            raise RunError(
                f"run {str(out)!r} has {name}={saved[name]!r}, got {value!r}; resume with the same "
                "options, or start in another folder"
            )
