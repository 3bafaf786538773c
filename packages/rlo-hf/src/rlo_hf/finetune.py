"""Finetune a causal language model on text with any loss of the family, and measure true
perplexity.

The authors' `ft_opt.py`, with their defaults, for any model and text, and with exp of cross entropy
where theirs prints exp of the rooted loss.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rlo_core.errors import RLOError, RunError
from rlo_core.perplexity import PerplexityResult, perplexity
from rlo_core.registry import create_loss
from rlo_core.runs import Run, read_run
from rlo_core.text import Split, TextData, hold_out, load_text
from torch import Tensor

from rlo_hf.blocks import blocks_of, token_ids
from rlo_hf.finetune_options import FinetuneOptions
from rlo_hf.models import ModelError, begin_at_error, load_model, load_tokenizer
from rlo_hf.trainer import Trainer

CHECKPOINTS = "checkpoints"


Report = Callable[[str], object]


def finetune(
    options: FinetuneOptions,
    *,
    save: Path | None = None,
    merge: bool = False,
    resume: bool = False,
    eval_only: bool = False,
    push: str | None = None,
    say: Report = lambda line: None,
) -> dict[str, Any]:
    """Finetune, measure perplexity before and after, write the run and the report.

    Args:
        options: What decides the result; it goes into run.json.
        save: The folder for the model (or its adapters) and tokenizer; None saves nothing.
        merge: Save the model with its adapters merged in.
        resume: Go on from the last checkpoint in the run folder.
        eval_only: Measure perplexity and stop.
        push: The hub name to push the model to; None for nowhere.
        say: Is given lines for a person.

    Returns:
        The summary that is in run.json.

    Raises:
        RLOError: on a model, data set, loss or run folder that is not as it must be.
    """
    create_loss(options.loss)  # an unknown loss is said before anything is loaded
    _check_lora(options)
    out = Path(options.out)
    if resume:
        _check_same(out, options)
    transformers.set_seed(options.seed)
    train, held = _texts(options, eval_only=eval_only)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    model = load_model(options.model, trust_remote_code=options.trust_remote_code)
    if merge and getattr(model, "is_quantized", False):
        raise ModelError(
            f"model {options.model!r} is quantized, so that adapters cannot be added to its "
            "weights; leave --merge out, and keep the adapter beside it or use the quantizer's "
            "merge (rlo-gptq merge ADAPTER DATASET --save DIR)"
        )
    model.to(_device())
    rows = [] if train is None else _rows(train, tokenizer, options)
    eval_ids = token_ids(held, tokenizer)
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

    def measure(step: int) -> PerplexityResult:
        result = perplexity(
            model,
            eval_ids,
            context=_context(model, options),
            batch_size=options.batch_size,
            max_tokens=options.eval_tokens,
        )
        run.log(step=step, split="eval", ce=result.ce, perplexity=result.perplexity)
        say(f"step {step}: perplexity {result.perplexity:.3f}, ce {result.ce:.4f} nats")
        return result

    before = measure(0)
    summary: dict[str, Any] = {
        "perplexity_before": before.perplexity,
        "ce_before": before.ce,
        "eval_tokens": before.tokens,
    }
    if not eval_only:
        model = _adapters(model, options)
        trainer = _trainer(model, rows, options, run, measure, say)
        try:
            done = trainer.train(resume_from_checkpoint=_checkpoint(out) if resume else None)
        except KeyboardInterrupt:
            run.finish(status="interrupted", **summary)
            raise
        after = measure(trainer.state.global_step)
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
    return summary


def _write_report(out: Path) -> None:
    from rlo_core.report import write_report

    write_report([out], out / "report.html")


def _device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


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
    ids = token_ids(train, tokenizer)
    return blocks_of(ids[: options.train_tokens], options.block)


def _context(model: Any, options: FinetuneOptions) -> int:
    if options.eval_context is not None:
        return options.eval_context
    config = model.config.get_text_config()
    return min(int(getattr(config, "max_position_embeddings", None) or 2048), 2048)


def _adapters(model: Any, options: FinetuneOptions) -> Any:
    if not options.lora:
        if getattr(model, "is_quantized", False):
            raise ModelError(
                f"model {options.model!r} is quantized, so its weights cannot be trained; train "
                "adapters on it with --lora RANK"
            )
        return model
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelError("--lora needs the package peft: pip install 'rlo-hf[peft]'") from error
    config = peft.LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"peft cannot put adapters on {options.model!r}: {error}") from error
    if options.lora_init == "loftq":
        begin_at_error(adapted, options.model, options.original or "")
    return adapted


def _check_lora(options: FinetuneOptions) -> None:
    if options.lora_init not in ("default", "loftq"):
        raise RLOError(f"lora_init must be default or loftq, got {options.lora_init!r}")
    if options.lora_init == "default":
        if options.original is not None:
            raise RLOError("--original needs --lora-init loftq")
    elif not options.lora or options.original is None:
        raise RLOError("--lora-init loftq needs --lora and --original MODEL")


def _precision(options: FinetuneOptions) -> str:
    if options.precision not in ("auto", "fp32", "fp16", "bf16"):
        raise RLOError(f"precision must be auto, fp32, fp16 or bf16, got {options.precision!r}")
    if options.precision == "auto":
        return "fp16" if _device().type == "cuda" else "fp32"
    return options.precision


def _trainer(
    model: Any,
    rows: list[dict[str, Tensor]],
    options: FinetuneOptions,
    run: Run,
    measure: Callable[[int], PerplexityResult],
    say: Report,
) -> Trainer:
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
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        logging_first_step=True,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=_device().type == "cuda",
        use_cpu=_device().type == "cpu",
    )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    say(f"{len(rows)} blocks of {options.block} tokens, {steps} updates, {precision}")
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        loss=options.loss,
        linear=options.linear,
        callbacks=[_Record(run, measure)],
    )
    # It prints its records on stdout, where a JSON document may be wanted.
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class _Record(transformers.TrainerCallback):
    """Writes what the Trainer logs into the run, and perplexity after each epoch but the last."""

    def __init__(self, run: Run, measure: Callable[[int], PerplexityResult]) -> None:
        self.run, self.measure = run, measure

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate", "epoch")
            kept = {name: logs[name] for name in names if name in logs}
            self.run.log(step=state.global_step, split="train", **kept)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self.measure(state.global_step)


def _checkpoint(out: Path) -> str:
    found = sorted(
        (out / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    if not found:
        raise RunError(f"run {str(out)!r} has no checkpoint to resume from")
    return str(found[-1])


def _check_same(out: Path, options: FinetuneOptions) -> None:
    """Raise RunError unless the run in the folder has these options."""
    saved = read_run(out).get("options", {})
    _checkpoint(out)
    for name, value in asdict(options).items():
        if name in saved and saved[name] != value:
            raise RunError(
                f"run {str(out)!r} has {name}={saved[name]!r}, got {value!r}; resume with the same "
                "options, or start in another folder"
            )
