"""The `rlo-hf` command. Importing this module imports neither torch nor transformers."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from rlo_core.cli.groups import FriendlyGroup

from rlo_hf import __version__

F = TypeVar("F", bound=Callable[..., Any])


def _option(name: str, *more: str, **settings: Any) -> Callable[[F], F]:
    """A click option that is also understood with underscores, as the authors' scripts spell it."""
    spellings = [name]
    if "-" in name[2:] and "/" not in name:
        spellings.append("--" + name[2:].replace("-", "_"))
    return click.option(*spellings, *more, **settings)


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlo-hf")
def main() -> None:
    """Rooted losses in Hugging Face."""


@main.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    }
)
@click.argument("script", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(script: str, arguments: tuple[str, ...]) -> None:
    """Run a training script, module or launcher unchanged, with a rooted loss.

    `rlo-hf run run_clm.py ARGS... --loss SPEC` runs SCRIPT as `python SCRIPT ARGS...` does. Every
    Trainer of the run, in whatever file or process it is made, is given the loss (without any, the
    models of the script are). SCRIPT may be a launcher (`trl`, `llamafactory-cli`, `swift`,
    `axolotl`), and `-m MODULE` runs a module. Also --loss=SPEC; without it the script runs as it
    is. --no-check leaves out the check of the first batch. --help goes to the script.
    """
    module = script == "-m"
    if module:
        if not arguments:
            raise click.UsageError("-m needs the name of a module")
        script, arguments = arguments[0], arguments[1:]
    loss, rest = split_loss(arguments)
    if loss is None and not module:
        from rlo_core.launch import run_script

        click.echo(f"no --loss SPEC given: {script} runs with its own loss", err=True)
        run_script(script, rest)
        return
    if loss is None:
        raise click.UsageError("-m MODULE needs --loss SPEC")
    from rlo_hf.script import run_with_loss

    check = "--no-check" not in rest
    rest = [word for word in rest if word != "--no-check"]
    run_with_loss(script, rest, loss, module=module, check=check)


def split_loss(arguments: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Take `--loss SPEC` out of a script's arguments; the last one counts, as in argparse.

    Returns:
        The spec, None where there is none, and the other arguments.

    Raises:
        click.UsageError: `--loss` without a spec.
    """
    loss: str | None = None
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        if word.startswith("--loss="):
            loss = word.partition("=")[2]
        elif word == "--loss":
            if not words:
                raise click.UsageError("--loss needs a spec, such as rlo:k=5,m=5")
            loss = words.pop(0)
        else:
            rest.append(word)
    return loss, rest


@main.command()
@click.argument("model")
@click.argument("dataset")
@_option(
    "--loss",
    default="rlo",
    show_default="rlo:k=5,m=5",
    help="The loss spec; auto compares some first, in at most 14 trainings.",
)
@_option("--k", type=float, help="The option k of the spec.")
@_option("--m", type=float, help="The option m of the spec.")
@_option("--out", help="The run folder.  [default: runs/finetune-MODEL-LOSS]")
@_option("--epochs", type=float, default=3.0, show_default=True, help="Passes over the text.")
@_option(
    "--max-steps", type=click.IntRange(min=-1), default=-1, help="Stop after this many updates."
)
@_option(
    "--block",
    "--block-size",
    "--block_size",
    "block",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
)
@_option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows per batch."
)
@_option(
    "--accumulation",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Batches per update.",
)
@_option("--lr", "learning_rate", default=1e-5, show_default=True, help="Peak learning rate.")
@_option("--warmup", type=int, help="Updates of warm-up.  [default: 500 or a tenth of the run]")
@_option("--weight-decay", default=0.01, show_default=True)
@_option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    show_default="fp16 on a GPU, else fp32",
)
@_option("--seed", default=42, show_default=True)
@_option("--train-split", default="train", show_default=True)
@_option("--eval-dataset", help="Where perplexity is measured.  [default: DATASET]")
@_option("--eval-split", default="validation", show_default=True)
@_option("--eval-context", type=int, help="Tokens per window.  [default: the model's, <= 2048]")
@_option("--eval-tokens", type=int, help="Measure on at most this many tokens.")
@_option("--train-tokens", type=int, help="Train on at most this many tokens.")
@_option("--text-column", help="The text column of a table.")
@_option("--lora", type=int, is_flag=False, flag_value=8, default=0, metavar="[RANK]")
@_option("--lora-alpha", type=int, help="Scale of the adapters.  [default: twice the rank]")
@_option(
    "--lora-init",
    type=click.Choice(["default", "loftq"]),
    default="default",
    show_default=True,
    help="loftq: adapters of a quantized model begin at its error; needs --original.",
)
@_option("--original", metavar="MODEL", help="The model that was quantized, for --lora-init loftq.")
@_option("--merge", is_flag=True, help="Save the model with its adapters merged in.")
@_option("--gradient-checkpointing", is_flag=True)
@_option(
    "--linear",
    type=click.Choice(["auto", "fused", "off"]),
    default="auto",
    show_default=True,
    help="The fused linear loss.",
)
@_option(
    "--teacher", metavar="MODEL", help="Hold the model to a teacher: adds +kl:beta=1 to the loss."
)
@_option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@_option("--save", type=click.Path(path_type=Path), help="The model's folder. [default: OUT/model]")
@_option("--no-save", is_flag=True, help="Keep no model.")
@_option("--resume", is_flag=True, help="Go on from the newest whole checkpoint.")
@_option(
    "--save-steps",
    type=click.IntRange(min=1),
    help="Updates between checkpoints.  [default: ten minutes, and every epoch]",
)
@_option("--eval-only", is_flag=True, help="Measure perplexity and stop.")
@_option("--push", metavar="NAME", help="Push the model to the hub. Off unless asked for.")
@_option("--dry-run", is_flag=True, help="Print the resolved plan and stop.")
@_option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def finetune(
    loss: str,
    k: float | None,
    m: float | None,
    out: str | None,
    merge: bool,
    save: Path | None,
    no_save: bool,
    resume: bool,
    save_steps: int | None,
    eval_only: bool,
    push: str | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Finetune a causal language model and measure true perplexity.

    MODEL is a folder, a .gguf file or a hub name; DATASET is wikitext2, c4, ptb, a hub name, or a
    text, jsonl or parquet file or a folder of them. Without a network only local paths and what is
    in the local cache work.
    """
    from rlo_core.registry import parse_spec

    parsed = parse_spec(loss)
    given = {name: value for name, value in (("k", k), ("m", m)) if value is not None}
    if parsed.name == "rlo" and not parsed.options:
        given = {"k": 5.0, "m": 5.0, **given}
    spec = str(parsed.with_options(**given))
    name = Path(settings["model"]).stem if settings["model"].endswith(".gguf") else ""
    name = name or Path(settings["model"]).name
    folder = out or f"runs/finetune-{name}-{re.sub(r'[^A-Za-z0-9.=-]+', '_', spec)}"

    from rlo_hf.finetuning.options import FinetuneOptions

    options = FinetuneOptions(loss=spec, out=folder, **settings)
    if parsed.name == "auto" and not dry_run:
        options = _chosen(options, folder)
    target = None if no_save else save or Path(folder) / "model"
    if dry_run:
        plan = {"save": target, "merge": merge, "resume": resume, "save_steps": save_steps,
                "eval_only": eval_only, "push": push}  # fmt: skip
        click.echo(json.dumps({**asdict(options), **plan}, indent=2, default=str))
        return
    _quiet_unless_terminal()
    from rlo_hf.finetuning.run import finetune as run_finetune

    result = run_finetune(
        options,
        save=target,
        merge=merge,
        resume=resume,
        eval_only=eval_only,
        push=push,
        save_steps=save_steps,
        say=lambda line: click.echo(line, err=True),
    )
    summary = result.summary()
    if as_json:
        click.echo(
            json.dumps({"out": folder, "loss": options.loss, **summary}, indent=2, default=str)
        )
        return
    click.echo(f"perplexity {summary['perplexity_before']:.3f}", nl=False)
    if "perplexity_after" in summary:
        click.echo(f" -> {summary['perplexity_after']:.3f}", nl=False)
    click.echo(f" ({summary['eval_tokens']} tokens); run and report in {folder}")


def _chosen(options: Any, folder: str) -> Any:
    """Compare losses on the same text first, and return the options with the one chosen."""
    from dataclasses import replace

    from rlo_core.compare.run import choose

    _quiet_unless_terminal()
    from rlo_hf.compare import HFTask

    rates = tuple(options.learning_rate * factor for factor in (0.3, 1.0, 3.0))
    where = Path(f"{folder}-compare")
    verdict = choose(
        HFTask(options, rates=rates), out=where, say=lambda line: click.echo(line, err=True)
    )
    click.echo(f"{verdict['summary']} ({where})", err=True)
    return replace(options, loss=verdict["choice"], learning_rate=verdict["rate"])


def _quiet_unless_terminal() -> None:
    """Turn progress bars off where stderr is not a terminal, before the libraries are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
