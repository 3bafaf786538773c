"""`rlo-gptq tune`: a packed model against the dense one's output; and options of `quantize`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.groups import GroupedCommand, filled, option
from rlo_gptq.cli.options import both_spellings, print_plan
from rlo_gptq.settings import EndToEndSettings


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """Tuning the whole model."""

    steps: int | None = option(
        "--tune-steps",
        short="--steps",
        type=click.IntRange(min=1),
        help=f"Steps of Adam: {EndToEndSettings.steps}.",
    )
    learning_rate: float | None = option(
        "--tune-rate",
        short="--rate",
        type=click.FloatRange(0, 1, min_open=True),
        help=f"Adam's step relative to a tensor's size: {EndToEndSettings.learning_rate:g}.",
    )
    batch: int | None = option(
        "--tune-batch",
        short="--batch",
        type=click.IntRange(min=1),
        help=f"Sequences of a step: {EndToEndSettings.batch}.",
    )
    nsamples: int | None = option(
        "--tune-nsamples",
        short="--nsamples",
        type=click.IntRange(min=2),
        help=f"Sequences, one in eight of them held out: {EndToEndSettings.nsamples}.",
    )
    top_k: int | None = option(
        "--tune-top-k",
        short="--top-k",
        type=click.IntRange(min=1),
        help=f"Of the dense model's next tokens, the rest is one: {EndToEndSettings.top_k}.",
    )
    loss: str | None = option(
        "--tune-loss",
        short="--loss",
        metavar="ce|SPEC",
        help="Weight tokens by the slope of a loss, e.g. rlo:k=5: ce, which is all alike.",
    )
    embeddings: bool | None = option(
        "--tune-embeddings/--no-tune-embeddings",
        short="--embeddings/--no-embeddings",
        help="Train embeddings and output layer too, packed ones' scales: on.",
    )

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by the names of `EndToEndSettings`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def settings(self, *, seqlen: int | None, seed: int) -> EndToEndSettings:
        """Return the settings that the options say; what is not given keeps its default.

        Raises:
            click.UsageError: a value is out of its range.
        """
        try:
            return replace(EndToEndSettings(seqlen=seqlen, seed=seed), **self.given())
        except ValueError as error:
            raise click.UsageError(str(error)) from error


@click.command("tune", cls=GroupedCommand)
@click.argument("checkpoint", type=shared.existing_folder)
@click.argument("dataset")
@click.option(
    "--save",
    "folder",
    type=shared.new_folder,
    help="The new checkpoint's folder, by default CHECKPOINT-tuned; the same command goes on.",
)
@click.option("--original", help="The dense model; by default the one CHECKPOINT was made of.")
@filled("end_to_end", EndToEnd, short=True)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    help="Tokens of a sequence; by default the model's length, at most 2048.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@shared.split
@shared.offload
@shared.device
@both_spellings("trust-remote-code", is_flag=True, help="Run code from the models' folders.")
@both_spellings("dry-run", is_flag=True, help="Print plan and memory; do nothing.")
@shared.as_json
def tune(
    checkpoint: Path,
    dataset: str,
    folder: Path | None,
    original: str | None,
    seqlen: int | None,
    seed: int,
    split: str | None,
    offload: bool,
    device: str,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
    end_to_end: EndToEnd,
) -> None:
    """Tune CHECKPOINT, a packed model of ours, on DATASET for the original model's output.

    Codes stay; scales, zeros, input scales, norms, biases and unpacked embeddings are trained for
    the KL divergence of next-token distributions, in the precision they are stored in. What is kept
    is the best on text held out. Ctrl-C keeps the best so far, and the same command goes on.
    """
    settings = end_to_end.settings(seqlen=seqlen, seed=seed)
    from rlo_gptq.tuning.run import Tuning, run_tuning

    tuning = Tuning(
        checkpoint,
        dataset,
        settings,
        original=original,
        split=split,
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        from rlo_gptq.pipeline.processes import pick_device

        source = tuning.source(pick_device(device))
        document = tuning.plan(source)
        source.close()
        print_plan(document, as_json=as_json)
        return
    out = folder or checkpoint.with_name(f"{checkpoint.resolve().name}-tuned")
    result = run_tuning(tuning, out, device=device)
    if result is None:  # not the first process
        return
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(described(result))


def described(document: dict[str, Any]) -> str:
    """Return in one line what a tuning did."""
    done = "complete already: " if document.get("already_done") else ""
    stopped = f"; stopped: {document['stopped']}" if document["stopped"] else ""
    return (
        f"{done}KL divergence on text held out {document['held_out_kl_before']:.4f} -> "
        f"{document['held_out_kl_after']:.4f} at step {document['best_step']} of "
        f"{document['steps']}{stopped}, {document['trained_numbers']:,} numbers trained, "
        f"{document['seconds']:.1f} s: {document['folder']}"
    )
