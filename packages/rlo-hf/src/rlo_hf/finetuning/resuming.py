"""A finetuning that was cut off goes on from its newest whole checkpoint, with the same options."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rlo_core.errors import RunError
from rlo_core.files import write_text
from rlo_core.runs.record import METRICS_FILE, read_metrics, read_run

from rlo_hf.finetuning.options import FinetuneOptions

CHECKPOINTS = "checkpoints"
_ZIPS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def last_checkpoint(out: Path, say: Callable[[str], object] = lambda line: None) -> str:
    """Return the newest whole checkpoint of the run in a folder.

    Args:
        out: The run folder.
        say: Called with a line for each checkpoint that is passed over, with the reason.

    Raises:
        RunError: there is none.
    """
    reasons = []
    for checkpoint in checkpoints_of(out / CHECKPOINTS):
        reason = what_is_missing(checkpoint)
        if reason is None:
            return str(checkpoint)
        reasons.append(f"{checkpoint.name} is not whole ({reason})")
        say(reasons[-1])
    if not reasons:
        raise RunError(f"run {str(out)!r} has no checkpoint to resume from")
    raise RunError(
        f"run {str(out)!r} has no whole checkpoint to resume from: {'; '.join(reasons)}; start it "
        "again without --resume"
    )


def what_is_missing(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be gone on from, or None for a whole one."""
    state = checkpoint / "trainer_state.json"
    try:
        step = json.loads(state.read_text(encoding="utf-8")).get("global_step")
    except FileNotFoundError:
        return "trainer_state.json is not there"
    except (ValueError, AttributeError):
        return "trainer_state.json is not whole"
    if step != _step_of(checkpoint):
        return f"trainer_state.json is of step {step}"
    for name in _ZIPS:
        path = checkpoint / name
        if name == "rng_state.pth" and not path.exists():
            continue  # one for each process, under other names
        if not path.is_file():
            return f"{name} is not there"
        if not zipfile.is_zipfile(path):
            return f"{name} is not whole"
    weights = [checkpoint / name for name in _WEIGHTS if (checkpoint / name).is_file()]
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is not whole"
        weights = [checkpoint / shard for shard in sorted(shards)]
    if not weights:
        return "it has no weights"
    broken = [path.name for path in weights if not _is_whole(path)]
    return f"{broken[0]} is not whole" if broken else None


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length < path.stat().st_size:
                return False
            header = json.loads(handle.read(length))
        ends = [item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def put_in_place(made: Path, folder: Path, *, keep: int) -> None:
    """Move a finished checkpoint to where it is looked for, then delete all but the newest.

    Args:
        made: The checkpoint, in a folder beside the others.
        folder: Where the others are.
        keep: How many stay.
    """
    for path in made.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    target = folder / made.name
    _delete(target)
    made.replace(target)
    for old in checkpoints_of(folder)[keep:]:
        _delete(old)


def _delete(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def rewind(out: Path, step: int) -> None:
    """Take out of a run's metrics what came after a step, since it will be done again."""
    kept = [record for record in read_metrics(out) if record.get("step", 0) <= step]
    write_text(out / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept))


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
