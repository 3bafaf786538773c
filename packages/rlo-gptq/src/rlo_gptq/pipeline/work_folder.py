"""The folder a model is quantized into, while that goes on: a plan, and one file for each finished
block.

The plan is written before the first block and says everything that decides the result. A block's
file appears whole or not at all, so that a run killed at any moment goes on after its last whole
block.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError
from rlo_core.files import remove_leftovers, write_json
from rlo_core.runs.folder import LOCK_FILE, writer_of
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.models.shards import save_tensors

PLAN_FILE = "rlo-gptq.json"
PARTS = ".blocks"
PROBES_FILE = "probes.json"
"""What `--bytes` measured before; may be in a folder where nothing else is yet."""
_NESTED = ("end_to_end",)  # of many settings, of which those that differ are told


class ResumeError(RLOError):
    """A folder that holds a run with other settings, or no run at all."""


class WorkFolder:
    """The output folder of one quantization.

    Args:
        folder: Where the model goes.
        decisions: Everything that decides the result, as plain JSON values.
    """

    def __init__(self, folder: Path, decisions: Mapping[str, Any]) -> None:
        self.folder = folder
        self.decisions: dict[str, Any] = json.loads(json.dumps(decisions))
        text = json.dumps(self.decisions, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan on disk, or None."""
        try:
            document: dict[str, Any] = json.loads((self.folder / PLAN_FILE).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ResumeError(f"{str(self.folder / PLAN_FILE)!r} is not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("decisions", {}), dict):
            raise ResumeError(
                f"{str(self.folder / PLAN_FILE)!r} is no plan of a quantization; choose another "
                "--save, or delete it"
            )
        return document

    def open(self) -> bool:
        """Write the plan, or check the one that is there; return whether there was one.

        Raises:
            ResumeError: the folder was begun with other settings, or holds something else.
        """
        plan = self.plan
        if plan is None:
            self.check_free()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("running")
            return False
        before = plan.get("decisions", {})
        if before != self.decisions:
            changed = _changes(before, self.decisions)
            raise ResumeError(
                f"{str(self.folder)!r} was begun with other settings ({'; '.join(changed)}); "
                "choose another --save, or delete it"
            )
        return True

    def check_free(self) -> None:
        """Refuse a folder that holds something else than what was begun here.

        Raises:
            ResumeError: it does.
        """
        if self.plan is not None or not self.folder.is_dir():
            return
        if any(path.name not in (LOCK_FILE, PROBES_FILE) for path in self.folder.iterdir()):
            raise ResumeError(
                f"{str(self.folder)!r} is not empty and no quantization was begun there; "
                "choose another --save"
            )

    def _write(self, status: str) -> None:
        write_json(
            self.folder / PLAN_FILE,
            {"status": status, "fingerprint": self.fingerprint, "decisions": self.decisions},
        )

    @property
    def done(self) -> bool:
        """Whether the model is complete."""
        plan = self.plan
        return plan is not None and plan.get("status") == "done"

    def finish(self) -> None:
        """Mark the model as complete and remove the blocks' files."""
        self._write("done")
        self.clean()

    def clean(self) -> None:
        """Remove the blocks' files of a complete model, and what killed runs left."""
        for path in sorted((self.folder / PARTS).glob("*")):
            path.unlink()
        if (self.folder / PARTS).is_dir():
            (self.folder / PARTS).rmdir()
        remove_leftovers(self.folder)

    def part(self, name: str) -> Path:
        """Return where the tensors of a part (a block, or "rest") are kept."""
        return self.folder / PARTS / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a part is there, whole."""
        return self.part(name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Write a part; its measurements first, so that the part is never there without them."""
        write_json(self.part(name).with_suffix(".json"), records)
        save_tensors(self.part(name), tensors, metadata=[("plan", self.fingerprint)])

    def tensors(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        with safe_open(self.part(name), framework="pt", device=str(device)) as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return what was measured when a part was made."""
        path = self.part(name).with_suffix(".json")
        try:
            loaded: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ResumeError(
                f"{str(path)!r} is damaged ({error}); delete it and the .safetensors file beside "
                "it to have that part made again"
            ) from error
        return loaded


def discard_unless_begun(copy: Path, folder: Path) -> None:
    """Remove a model made to be quantized into `folder`, unless a run there can go on from it."""
    if not (folder / PARTS).is_dir():
        shutil.rmtree(copy, ignore_errors=True)


def refuse_writer(folder: Path) -> None:
    """Refuse a folder that another process is writing right now.

    Raises:
        ResumeError: names the process.
    """
    writer = writer_of(folder)
    if writer is not None:
        raise ResumeError(
            f"{str(folder)!r} is being written by {writer}; wait for it to end, or choose another "
            "--save"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """Say what differs, inside of what both have."""
    changed = []
    for name in sorted({*before, *now}):
        old, new, full = before.get(name), now.get(name), f"{within}{name}"
        if old == new:
            continue
        if within == "" and isinstance(old, dict) and isinstance(new, dict) and name in _NESTED:
            changed += _changes(old, new, f"{name}.")
        else:
            changed.append(f"{full} was {_short(old)}, now {_short(new)}")
    return changed


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
