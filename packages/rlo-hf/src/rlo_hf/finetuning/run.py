"""Finetune a causal language model on text with any loss of the family, and measure true
perplexity.

The authors' `ft_opt.py`, with their defaults, for any model and text, and with exp of cross entropy
where theirs prints exp of the rooted loss.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from rlo_core.errors import RLOError
from rlo_core.lm.models import ModelError, open_model, open_tokenizer
from rlo_core.lm.perplexity import PerplexityResult, perplexity
from rlo_core.lm.text import Split, TextData, hold_out, load_text
from rlo_core.lm.tokens import token_blocks, token_ids, window_length
from rlo_core.registry import create_loss
from rlo_core.runs.folder import lock_folder
from rlo_core.runs.record import Run, read_metrics
from torch import Tensor

from rlo_hf.finetuning.adapters import check_adapters, with_adapters
from rlo_hf.finetuning.options import FinetuneOptions
from rlo_hf.finetuning.resuming import CHECKPOINTS, check_same, last_checkpoint, rewind
from rlo_hf.finetuning.trainer import Report, device, trainer_of
from rlo_hf.weights import Weights


@dataclass(frozen=True)
class FinetuneResult:
    """What a finetuning measured; the fields after the third are None without training.

    Attributes:
        perplexity_before: exp of `ce_before`.
        ce_before: Mean cross entropy of a held-out token, nats.
        eval_tokens: The tokens it was measured on.
        perplexity_after: exp of `ce_after`.
        ce_after: The same after training.
        steps: Updates.
        train_seconds: Of training alone.
        train_loss: The mean objective in training.
        linear_path: "fused", or why the logits were built.
        model: The folder of the model, if it was saved.
        pushed: Its hub name, if it was pushed.
    """

    perplexity_before: float
    ce_before: float
    eval_tokens: int
    perplexity_after: float | None = None
    ce_after: float | None = None
    steps: int | None = None
    train_seconds: float | None = None
    train_loss: float | None = None
    linear_path: str | None = None
    model: str | None = None
    pushed: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return what is known, as it is in run.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def finetune(
    options: FinetuneOptions,
    *,
    save: Path | None = None,
    merge: bool = False,
    resume: bool = False,
    eval_only: bool = False,
    push: str | None = None,
    save_steps: int | None = None,
    weights: Weights | None = None,
    inspect: Callable[[Any, Tensor], None] | None = None,
    say: Report = lambda line: None,
) -> FinetuneResult:
    """Finetune, measure perplexity before and after, write the run and the report.

    Args:
        options: What decides the result; it goes into run.json.
        save: The folder for the model (or its adapters) and tokenizer; None saves nothing.
        merge: Save the model with its adapters merged in.
        resume: Go on from the newest whole checkpoint in the run folder.
        eval_only: Measure perplexity and stop.
        push: The hub name to push the model to; None for nowhere.
        save_steps: Updates between checkpoints; None for ten minutes and every epoch.
        weights: A weight for each token from the batch and its row statistics; as `rlo_hf.Trainer`.
        inspect: Is called with the trained model and the held-out token ids, (N).
        say: Called with each line of progress that a person should read.

    Returns:
        What is in the summary of run.json.

    Raises:
        RLOError: on a model, data set, loss or run folder that is not as it must be, and for a
            folder that another process is writing.
    """
    create_loss(options.loss)  # an unknown loss is said before anything is loaded
    check_adapters(options)
    if "+kl" in options.loss and options.teacher is None and not options.lora:
        raise RLOError(
            f"loss {options.loss!r} needs a reference: --teacher MODEL, or --lora RANK, where the "
            "model without its adapters is the reference"
        )
    if save_steps is not None and save_steps < 1:
        raise ValueError(f"save_steps must be at least 1, got {save_steps}")
    first = int(os.environ.get("RANK", "0")) == 0
    with lock_folder(options.out) if first else nullcontext():
        return _finetune(
            options,
            save=save,
            merge=merge,
            resume=resume,
            eval_only=eval_only,
            push=push,
            save_steps=save_steps,
            weights=weights,
            inspect=inspect,
            say=say,
        )


def _finetune(
    options: FinetuneOptions,
    *,
    save: Path | None,
    merge: bool,
    resume: bool,
    eval_only: bool,
    push: str | None,
    save_steps: int | None,
    weights: Weights | None,
    inspect: Callable[[Any, Tensor], None] | None,
    say: Report,
) -> FinetuneResult:
    out = Path(options.out)
    checkpoint = None
    if resume:
        check_same(out, options)
        checkpoint = last_checkpoint(out, say)
        rewind(out, int(checkpoint.rpartition("-")[2]))
    transformers.set_seed(options.seed)
    train, held = _texts(options, eval_only=eval_only)
    tokenizer = open_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    model = open_model(options.model, trust_remote_code=options.trust_remote_code)
    if merge and getattr(model, "is_quantized", False):
        raise ModelError(
            f"model {options.model!r} is quantized, so that adapters cannot be added to its "
            "weights; leave --merge out, and keep the adapter beside it or use the quantizer's "
            "merge (rlo-gptq merge ADAPTER DATASET --save DIR)"
        )
    model.to(device())
    rows = [] if train is None else _rows(train, tokenizer, options)
    eval_ids = token_ids(tokenizer, held)
    if not eval_only:
        model = with_adapters(model, options)
    run = Run.create(
        out,
        kind="hf finetune",
        loss=None if eval_only else options.loss,
        options=asdict(options),
        seed=options.seed,
        data={
            "train": None if train is None else [train.name, train.fingerprint],
            "train_blocks": len(rows),
            "eval": [held.name, held.fingerprint],
            "eval_tokens": len(eval_ids[: options.eval_tokens]),
        },
        resume=resume,
    )

    measured = {row["step"] for row in read_metrics(out) if row.get("split") == "eval"}

    def measure(step: int) -> PerplexityResult:
        result = perplexity(
            model,
            eval_ids,
            context=window_length(model.config, options.eval_context),
            batch_size=options.batch_size,
            max_tokens=options.eval_tokens,
        )
        if step not in measured:
            run.log(step=step, split="eval", ce=result.ce, perplexity=result.perplexity)
            measured.add(step)
        say(f"step {step}: perplexity {result.perplexity:.3f}, ce {result.ce:.4f} nats")
        return result

    # Also after a break, since the model is loaded as it was at the start; it is logged once.
    with model.disable_adapter() if options.lora and not eval_only else nullcontext():
        before = measure(0)
    summary: dict[str, Any] = {
        "perplexity_before": before.perplexity,
        "ce_before": before.ce,
        "eval_tokens": before.tokens,
    }
    if not eval_only:
        teacher = None
        if options.teacher is not None:
            teacher = open_model(options.teacher, trust_remote_code=options.trust_remote_code)
        trainer = trainer_of(model, rows, options, run, measure, say, save_steps, weights, teacher)
        try:
            done = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            run.finish(status="interrupted", **summary)
            raise
        after = measure(trainer.state.global_step)
        if inspect is not None:
            inspect(model, eval_ids[: options.eval_tokens])
        summary |= {
            "perplexity_after": after.perplexity,
            "ce_after": after.ce,
            "steps": trainer.state.global_step,
            "train_seconds": round(done.metrics["train_runtime"], 1),
            "train_loss": done.training_loss,
            "linear_path": trainer.linear_path,
        }
        if merge and options.lora:
            model = model.merge_and_unload()
        if save is not None:
            model.save_pretrained(save)
            tokenizer.save_pretrained(save)
            summary["model"] = str(save)
        if push is not None:
            model.push_to_hub(push)
            tokenizer.push_to_hub(push)
            summary["pushed"] = push
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    run.finish(**summary)
    _write_report(out)
    return FinetuneResult(**summary)


def _write_report(out: Path) -> None:
    from rlo_core.runs.report import write_report

    write_report([out], out / "report.html")


def _texts(options: FinetuneOptions, *, eval_only: bool) -> tuple[TextData | None, TextData]:
    column = options.text_column
    held = load_text(
        options.eval_dataset or options.dataset,
        cast("Split", options.eval_split),
        text_column=column,
    )
    if eval_only:
        return None, held
    train = load_text(options.dataset, cast("Split", options.train_split), text_column=column)
    if train.fingerprint == held.fingerprint:
        if train.divided:
            raise RLOError(
                f"the text that perplexity is measured on is that of training, the "
                f"{options.train_split} split of {options.dataset!r}; give another --eval-split"
            )
        train, held = hold_out(train)
    return train, held


def _rows(train: TextData, tokenizer: Any, options: FinetuneOptions) -> list[dict[str, Tensor]]:
    blocks = token_blocks(token_ids(tokenizer, train)[: options.train_tokens], options.block)
    return [{"input_ids": row, "labels": row} for row in blocks]  # the model shifts the labels
