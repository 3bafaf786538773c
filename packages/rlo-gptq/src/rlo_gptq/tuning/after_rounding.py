"""`quantize --tune e2e`: rounding into a folder beside the checkpoint's, then tuning into it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlo_gptq.calibration.token_weights import weighting_link
from rlo_gptq.options import Options
from rlo_gptq.pipeline.processes import join_processes
from rlo_gptq.pipeline.run import read_summary, run_quantization
from rlo_gptq.pipeline.work_folder import ResumeError, WorkFolder
from rlo_gptq.tuning.run import SUMMARY, Tuning, run_tuning


def quantize_and_tune(
    options: Options,
    folder: Path,
    *,
    device: str = "auto",
    progress: bool | None = None,
    base: str | None = None,
) -> dict[str, Any] | None:
    """Quantize, and tune the result end to end; both go on where they were stopped.

    Args:
        options: What to do, `end_to_end` among it.
        folder: The checkpoint's folder.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress on stderr; by default if it is a terminal.
        base: The original model's name for the model card, if not that in `options`.

    Returns:
        The summary of the quantization, that of the tuning under `end_to_end`; None in all
        processes but the first.

    Raises:
        RLOError: the model, the data or the folder is refused.
    """
    settings = options.end_to_end
    assert settings is not None
    weighting_link(settings.loss)  # a wrong spec is refused before anything is done
    rounded = folder.with_name(f".{folder.name}.rounded")
    work = WorkFolder(folder, {})
    work.check_free()
    if work.done:
        return _done(options, work)
    with join_processes(device) as processes:  # once for both
        document = run_quantization(
            replace(options, end_to_end=None), rounded, device=device, progress=progress, base=base
        )
        processes.wait()
        tuning = Tuning(
            rounded,
            options.dataset,
            settings,
            original=options.model,
            split=options.split,
            offload=options.offload,
            trust_remote_code=options.trust_remote_code,
        )
        tuned = run_tuning(tuning, folder, device=device, progress=progress)
        if document is None or tuned is None:
            return None
        shutil.rmtree(rounded)
    document.pop("already_done", None)
    seconds = round(document["seconds"] + tuned["seconds"], 3)
    return {
        **document,
        "folder": str(folder),
        "bytes": tuned["bytes"],
        "seconds": seconds,
        "end_to_end": tuned,
    }


def _done(options: Options, work: WorkFolder) -> dict[str, Any]:
    """Return the summary of a checkpoint that is complete.

    Raises:
        ResumeError: it was made with other settings.
    """
    plan = work.plan or {}
    made: dict[str, Any] = plan.get("decisions", {})
    wanted = json.loads(json.dumps(options.decisions()))
    assert options.end_to_end is not None
    tuned = made.get("end_to_end") or {}
    others = [name for name, value in wanted.items() if made.get(name, value) != value]
    # The length of sequences is decided by the model where it is left open.
    others += [
        f"end_to_end.{name}"
        for name, value in asdict(options.end_to_end).items()
        if tuned.get(name) != value
    ]
    if "seqlen" in others and options.seqlen is None:
        others.remove("seqlen")
    if others:
        raise ResumeError(
            f"{str(work.folder)!r} was made with other settings ({', '.join(others)}); choose "
            "another --save, or delete it"
        )
    summary = read_summary(work.folder)
    names = [*SUMMARY, "folder"]
    return {
        **summary,
        "end_to_end": {name: summary[name] for name in names if name in summary},
        "already_done": True,
    }
