"""The Trainer of a finetuning: the authors' settings, and what it logs written into the run."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rlo_core.errors import RLOError, RunError
from rlo_core.lm.perplexity import PerplexityResult
from rlo_core.runs.record import Run
from torch import Tensor

from rlo_hf.finetuning.options import FinetuneOptions
from rlo_hf.finetuning.resuming import CHECKPOINTS, checkpoints_of, put_in_place
from rlo_hf.trainer import Trainer
from rlo_hf.weights import Weights

Report = Callable[[str], object]


def device() -> torch.device:
    """Return the accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def trainer_of(
    model: Any,
    rows: list[dict[str, Tensor]],
    options: FinetuneOptions,
    run: Run,
    measure: Callable[[int], PerplexityResult],
    say: Report,
    save_steps: int | None = None,
    weights: Weights | None = None,
    reference: Any = None,
) -> Trainer:
    """Return the Trainer for a model and its rows.

    Args:
        model: With its adapters.
        rows: Blocks of token ids with labels.
        options: The settings.
        run: Where its records and checkpoints go.
        measure: Is called with the step after every epoch but the last.
        say: Called with each line of progress that a person should read.
        save_steps: Updates between checkpoints; None for ten minutes and every epoch.
        weights: As `rlo_hf.Trainer`.
        reference: The teacher, or None.

    Raises:
        RLOError: an unknown precision, or a loss that the model cannot be trained on.
    """
    per_update = options.batch_size * options.accumulation
    steps = options.max_steps
    if steps < 0:
        steps = max(1, int(options.epochs * -(-len(rows) // per_update)))
    warmup = options.warmup if options.warmup is not None else min(500, steps // 10)
    precision = _precision(options)
    args = transformers.TrainingArguments(
        output_dir=str(run.folder / CHECKPOINTS),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=warmup,
        weight_decay=options.weight_decay,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        seed=options.seed,
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        logging_steps=10,
        logging_first_step=True,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=device().type == "cuda",
        use_cpu=device().type == "cpu",
    )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    say(f"{len(rows)} blocks of {options.block} tokens, {steps} updates, {precision}")
    callbacks: list[Any] = [Record(run, measure)]
    if save_steps is None:
        callbacks.append(SaveByTheClock())
    trainer = CheckpointedTrainer(
        model,
        args,
        train_dataset=rows,
        loss=options.loss,
        linear=options.linear,
        weights=weights,
        reference_model=reference,
        callbacks=callbacks,
    )
    # It prints its records on stdout, where a JSON document may be wanted.
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class CheckpointedTrainer(Trainer):
    """A Trainer whose checkpoints are there whole or not at all; the newest two stay."""

    _making: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        if self._making is not None:
            return self._making
        return str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        making = folder / "unfinished"
        self._making = str(making)
        step = self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                put_in_place(making / f"checkpoint-{step}", folder, keep=2)
        except OSError as error:
            whole = [path.name for path in checkpoints_of(folder)]
            way_out = f"--resume goes on from {whole[0]}" if whole else "there is no older one"
            raise RunError(f"checkpoint-{step} could not be written: {error}; {way_out}") from error
        finally:
            self._making = None
            if self.args.should_save:
                shutil.rmtree(making, ignore_errors=True)


class SaveByTheClock(transformers.TrainerCallback):
    """Asks for a checkpoint when ten minutes have gone by since the last one."""

    def __init__(self, seconds: float = 600.0) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.last >= self.seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()


class Record(transformers.TrainerCallback):
    """Writes what the Trainer logs into the run, and perplexity after each epoch but the last."""

    def __init__(self, run: Run, measure: Callable[[int], PerplexityResult]) -> None:
        self.run, self.measure = run, measure

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate", "epoch", "k")
            kept = {name: logs[name] for name in names if name in logs}
            self.run.log(step=state.global_step, split="train", **kept)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self.measure(state.global_step)


def _precision(options: FinetuneOptions) -> str:
    if options.precision not in ("auto", "fp32", "fp16", "bf16"):
        raise RLOError(f"precision must be auto, fp32, fp16 or bf16, got {options.precision!r}")
    if options.precision == "auto":
        return "fp16" if device().type == "cuda" else "fp32"
    return options.precision
