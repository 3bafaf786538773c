"""A run on disk: `run.json` has everything it decided, `metrics.jsonl` everything it measured.

Every host writes these two files and `rlo report` renders any number of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlo_core.errors import RunError
from rlo_core.files import write_json, write_text

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_VERSIONED = (
    "rlo-core",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "trl",
    "peft",
    "lightning",
    "scikit-learn",
    "numpy",
)


def versions(names: Sequence[str] = _VERSIONED) -> dict[str, str]:
    """Return the installed versions of the distributions that are there, and Python's."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what a number depends on: processor, cores, accelerator; imports no torch."""
    import sys

    described: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count()}
    try:
        with Path("/proc/cpuinfo").open() as lines:
            described["cpu"] = next(
                line.partition(":")[2].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        described["cpu"] = platform.processor()
    torch = sys.modules.get("torch")
    if torch is not None:
        described["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            described["gpu"] = torch.cuda.get_device_name()
    return described


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: a scalar tensor as a number, nan and inf as text."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Run:
    """A run folder that is being written.

    Args:
        folder: Where `run.json` and `metrics.jsonl` go; made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._started = time.monotonic()
        self._document: dict[str, Any] = {}

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        kind: str,
        loss: str | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        data: Mapping[str, Any] | None = None,
        resume: bool = False,
        known: Mapping[str, float] | None = None,
    ) -> Run:
        """Start a run: write `run.json`, and empty `metrics.jsonl` unless `resume`.

        Hold `rlo_core.runs.folder.lock_folder` around it and all that the run writes.

        Args:
            folder: The run folder.
            kind: What ran, e.g. "timm train", "hf finetune", "gptq quantize".
            loss: The spec string.
            options: Every resolved option.
            seed: The seed.
            data: What identifies the data: name, sizes, a fingerprint.
            resume: Go on with the metrics that are there.
            known: With `resume`, how far the checkpoint goes, e.g. `{"epoch": 3}`: later records
                are dropped, for the run is about to measure them again.

        Raises:
            RunError: with `resume`, if the metrics that are there cannot be read.
        """
        run = cls(folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        run._document = {
            "kind": kind,
            "loss": loss,
            "options": dict(options or {}),
            "seed": seed,
            "data": dict(data or {}),
            "versions": versions(),
            "machine": machine(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "status": "running",
        }
        metrics = run.folder / METRICS_FILE
        if resume and metrics.exists():  # first: where they cannot be read, the run is left alone
            _cut_metrics(run.folder, known or {})
        else:
            metrics.write_bytes(b"")
        write_json(run.folder / RUN_FILE, run._document)
        return run

    def log(self, **record: Any) -> None:
        """Append one line of numbers and strings, e.g. `epoch=3, split="val", ce=0.41`."""
        line = json.dumps({key: _plain(value) for key, value in record.items()}, default=str) + "\n"
        with (self.folder / METRICS_FILE).open("ab", buffering=0) as handle:
            size = handle.tell()
            try:
                whole = handle.write(line.encode("utf-8")) == len(line.encode("utf-8"))
                if not whole:  # a disk that is full takes a part, and says so at the next write
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), handle.name)
            except OSError:
                with contextlib.suppress(OSError):
                    handle.truncate(size)
                raise

    def finish(self, *, status: str = "done", **summary: Any) -> None:
        """Write the summary into `run.json`."""
        self._document["status"] = status
        self._document["seconds"] = round(time.monotonic() - self._started, 3)
        self._document["summary"] = {key: _plain(value) for key, value in summary.items()}
        write_json(self.folder / RUN_FILE, self._document)


def _cut_metrics(folder: Path, known: Mapping[str, float]) -> None:
    """Drop the records beyond what is known, and a last line that was cut off."""
    kept = [
        record
        for record in read_metrics(folder)
        if all(_at_most(record.get(name), last) for name, last in known.items())
    ]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_text(folder / METRICS_FILE, lines)


def _at_most(value: Any, last: float) -> bool:
    return not isinstance(value, (int, float)) or value <= last


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the document of `run.json`.

    Raises:
        RunError: there is none, it is not JSON, or one of its fields is not what `Run` writes.
    """
    path = Path(folder) / RUN_FILE
    try:
        text = read_utf8(path)
    except FileNotFoundError:
        raise RunError(f"no run in {str(folder)!r}: {RUN_FILE} is not there") from None
    document = parse_object(text, repr(str(path)))
    for name, (kind, words) in _FIELDS.items():
        if document.get(name) is not None and not isinstance(document[name], kind):
            got = type(document[name]).__name__
            raise RunError(f"{str(path)!r}: {name} must be {words}, got {got}")
    return document


_FIELDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("kind", "loss", "started", "status"), (str, "a text")),
    **dict.fromkeys(("options", "data", "versions", "machine", "summary"), (dict, "an object")),
}
"""The fields of `run.json` that readers rely on, where they are there."""


def read_utf8(path: Path) -> str:
    """Return the text of a file.

    Raises:
        RunError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{str(path)!r} is not UTF-8 text: {error.reason}") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        text: The JSON.
        where: What holds it, for the message.

    Raises:
        RunError: it is not JSON, or no object, or holds text that no file can hold.
    """
    try:
        document = json.loads(text)
        if "\\ud" in text.lower():  # a half of a surrogate pair cannot be written again
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise RunError(f"{where} is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise RunError(f"{where} holds text that is not Unicode") from error
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RunError(f"{where} must hold an object, got {type(document).__name__}")
    return document


def read_metrics(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
        RunError: the file is not UTF-8, or another line is not a JSON object.
    """
    path = Path(folder) / METRICS_FILE
    if path.exists():
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a last line that was cut off is left out.

    Raises:
        RunError: the file is not UTF-8, or another line is not a JSON object.
    """
    lines = read_utf8(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield parse_object(line, f"{str(path)!r}, line {number},")
        except RunError:
            if number == len(lines):  # no line end after it: the writer was stopped
                return
            raise
