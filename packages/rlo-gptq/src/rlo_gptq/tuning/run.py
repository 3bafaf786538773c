"""A packed checkpoint tuned end to end into a new one, with its run's files and a report."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError, RunError
from rlo_core.lm.text import load_first_split
from rlo_core.lm.tokens import token_ids
from rlo_core.runs.folder import lock_folder
from rlo_core.runs.record import Run, read_run
from torch import Tensor
from transformers import AutoTokenizer

from rlo_gptq.calibration.sequences import digest_of
from rlo_gptq.calibration.token_weights import weighting_link
from rlo_gptq.checkpoint.hf_quantizer import METHOD, RLOGPTQConfig
from rlo_gptq.checkpoint.load import read_quantization, weight_files
from rlo_gptq.checkpoint.validation import check_folder
from rlo_gptq.models.digests import file_digests
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.source import ModelSource, find_model
from rlo_gptq.pipeline.plan import sequence_length
from rlo_gptq.pipeline.processes import Processes, join_processes
from rlo_gptq.pipeline.progress import Bar, Log
from rlo_gptq.pipeline.run import read_summary
from rlo_gptq.pipeline.work_folder import PLAN_FILE, WorkFolder
from rlo_gptq.report.page import write_page
from rlo_gptq.settings import EndToEndSettings
from rlo_gptq.tuning.finish import write_tuned
from rlo_gptq.tuning.loop import BEST, INTERRUPTED, Loop, Outcome
from rlo_gptq.tuning.memory import plan_tuning
from rlo_gptq.tuning.student import Student
from rlo_gptq.tuning.teacher import write_targets
from rlo_gptq.tuning.text import split_sequences

SUMMARY = (
    "held_out_kl_before",
    "held_out_kl_after",
    "best_step",
    "steps",
    "stopped",
    "trained_numbers",
    "seconds",
)
"""What a tuning reports, in this order."""


class TuningError(RLOError):
    """A checkpoint that cannot be tuned against a model."""


@dataclass(frozen=True)
class Tuning:
    """One tuning, before it begins.

    Args:
        folder: The packed checkpoint.
        dataset: The text: what `load_text` takes, its training split or else its validation split.
        settings: Steps, rate, sequences.
        original: The dense model; None for the one that the checkpoint's run names.
        split: Of the data set, if another.
        offload: Keep hidden states of the dense model in a file.
        trust_remote_code: Let transformers run code from the folders.
    """

    folder: Path
    dataset: str
    settings: EndToEndSettings
    original: str | None = None
    split: str | None = None
    offload: bool = False
    trust_remote_code: bool = False

    @property
    def config(self) -> RLOGPTQConfig:
        """The checkpoint's quantization config.

        Raises:
            TuningError: it has none of ours.
        """
        check_folder(self.folder)
        found = read_quantization(self.folder)
        method = found.get("quant_method")
        if method != METHOD:
            raise TuningError(
                f"{str(self.folder)!r} must be quantized by {METHOD}, got {method!r}; "
                "`rlo-gptq import` takes GPTQ checkpoints over"
            )
        config: RLOGPTQConfig = RLOGPTQConfig.from_dict(found)
        return config

    def source(self, device: torch.device) -> ModelSource:
        """Return the dense model.

        Raises:
            TuningError: none is named, or it is another than the one that was packed.
        """
        name = self.original
        if name is None:
            try:
                name = read_run(self.folder)["options"]["model"]
            except (RunError, KeyError, TypeError):
                raise TuningError(
                    f"{str(self.folder)!r} does not name the model it was made of; give --original"
                ) from None
        source = ModelSource(
            find_model(str(name)), device=device, trust_remote_code=self.trust_remote_code
        )
        ours = json.loads((self.folder / "config.json").read_text("utf-8"))
        theirs = json.loads(source.config.to_json_string(use_diff=False))
        for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise TuningError(
                    f"the original model must have the packed model's {key}, {ours[key]!r}, got "
                    f"{theirs[key]!r} in {str(name)!r}"
                )
        return source

    def layout(self, source: ModelSource) -> Layout:
        """Return the checkpoint's blocks and packed layers."""
        config = self.config
        count = len(list(source.model.get_submodule(config.blocks).children()))
        linears = tuple(
            tuple(
                name for name, blocks in config.modules.items() if blocks is None or index in blocks
            )
            for index in range(count)
        )
        bits = {f"{config.blocks}.{name}": number for name, number in config.bits.items()}
        return Layout(config.blocks, count, linears, config.split_experts, bits)

    def plan(self, source: ModelSource) -> dict[str, int]:
        """Return what tuning would take, in numbers to show."""
        return plan_tuning(source, self.config, self.settings, offload=self.offload)

    def text(self, source: ModelSource, seqlen: int) -> tuple[Tensor, int, dict[str, Any]]:
        """Return the sequences, how many are held out, and what identifies them."""
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        wanted = [self.split] if self.split else ["train", "validation"]
        data, split = load_first_split(self.dataset, wanted)
        sequences, held = split_sequences(
            token_ids(tokenizer, data),
            count=self.settings.nsamples,
            length=seqlen,
            seed=self.settings.seed,
        )
        described = {"name": data.name, "split": split, "fingerprint": data.fingerprint}
        return sequences, held, described


def run_tuning(
    tuning: Tuning, out: Path, *, device: str = "auto", progress: bool | None = None
) -> dict[str, Any] | None:
    """Tune a checkpoint into the folder `out`, or go on with what was begun there.

    Args:
        tuning: What to do.
        out: The tuned checkpoint's folder.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress on stderr; by default if it is a terminal.

    Returns:
        The summary; None in all processes but the first.

    Raises:
        RLOError: the checkpoint, the model, the text or the folder is refused.
        KeyboardInterrupt: Ctrl-C; the best so far is in `out`, and the same call goes on.
    """
    begin = time.perf_counter()
    link = weighting_link(tuning.settings.loss)  # a wrong spec is refused before anything is done
    with join_processes(device) as processes, _one_writer(out, processes):
        source = tuning.source(processes.device)
        try:
            seqlen = sequence_length(source.config, tuning.settings.seqlen)
            sequences, held, data = tuning.text(source, seqlen)
            work = WorkFolder(out, _decisions(tuning, source, sequences, data))
            if processes.first:
                work.open()
            done = processes.broadcast({"done": processes.first and work.done}, 0)["done"]
            if done:
                processes.wait()
                if not processes.first:
                    return None
                return {**read_summary(out), "already_done": True}
            runs: list[Run] = []
            if processes.first:
                options = {**asdict(tuning.settings), "folder": str(tuning.folder)}
                runs.append(
                    Run.create(
                        out,
                        kind="gptq tune",
                        loss=tuning.settings.loss,
                        options={**options, "model": str(source.folder), "dataset": data["name"]},
                        seed=tuning.settings.seed,
                        data=data,
                    )
                )
            shown = sys.stderr.isatty() if progress is None else progress
            bar = Bar(runs) if processes.first and shown else Log(runs)
            with bar:
                write_targets(
                    source,
                    tuning.layout(source),
                    sequences,
                    work,
                    processes,
                    k=tuning.settings.top_k,
                    offload=out if tuning.offload else None,
                    note=lambda index, count: bar.block(index, count, "dense model"),
                )
                processes.wait()
                student = Student(
                    tuning.folder,
                    tuning.config.blocks,
                    processes.device,
                    embeddings=tuning.settings.embeddings,
                    trust_remote_code=tuning.trust_remote_code,
                )
                loop = Loop(
                    student,
                    sequences,
                    held,
                    tuning.settings,
                    link,
                    work,
                    processes,
                    note=lambda record: bar.step(record, tuning.settings.steps),
                )
                outcome = loop.run()
            document = None
            if processes.first:
                seconds = round(time.perf_counter() - begin, 3)
                document = _finish(tuning, out, work, outcome, student, runs[0], seconds)
            processes.wait()
        finally:
            source.close()
    if outcome.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    return document


def _one_writer(out: Path, processes: Processes) -> AbstractContextManager[object]:
    """Keep the folder for the first of these processes."""
    return lock_folder(out) if processes.first else nullcontext()


def _decisions(
    tuning: Tuning, source: ModelSource, sequences: Tensor, data: dict[str, Any]
) -> dict[str, Any]:
    """Return all that decides the result; what decided the codes stays beside it."""
    try:
        before = json.loads((tuning.folder / PLAN_FILE).read_text("utf-8"))["decisions"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}  # imported from another format
    return {
        **before,
        "end_to_end": {
            **asdict(tuning.settings),
            "data": data,
            "tokens": digest_of(sequences),
            "weights": source.fingerprint(),
            "checkpoint": file_digests(weight_files(tuning.folder)),
            "earlier": before.get("end_to_end"),
        },
    }


def _finish(
    tuning: Tuning,
    out: Path,
    work: WorkFolder,
    outcome: Outcome,
    student: Student,
    run: Run,
    seconds: float,
) -> dict[str, Any]:
    """Write the checkpoint with the best tensors, and the run's summary."""
    first, best = outcome.history[0], outcome.best
    document = {
        "folder": str(out),
        "held_out_kl_before": first["held_out_kl"],
        "held_out_kl_after": best["held_out_kl"],
        "best_step": best["step"],
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "trained_numbers": sum(part.numbers for part in student.trained),
        "seconds": seconds,
    }
    document["bytes"] = write_tuned(tuning.folder, work.part(BEST), out, document)
    interrupted = outcome.stopped == INTERRUPTED
    summary = {**_of_rounding(tuning.folder), **document}
    run.finish(status="stopped" if interrupted else "done", **summary, evaluations=outcome.history)
    write_page(out, title=f"Tuned: {out.name}")
    if not interrupted:
        work.finish()
    return document


def _of_rounding(folder: Path) -> dict[str, Any]:
    """Return what the checkpoint's own run measured: the layers by their error."""
    try:
        summary = read_run(folder)["summary"]
        return dict(summary) if isinstance(summary, dict) else {}
    except (RunError, KeyError):
        return {}
