"""The demo's last part: a small language model trained, quantized at 2 bits, reloaded, evaluated.

The text is the source of Python's standard library, which every installation has; one token a byte.
"""

from __future__ import annotations

import argparse as _first
import inspect
import shutil
import typing as _second
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rlo_core.demo.digits import show_table
from rlo_core.lm.perplexity import perplexity
from rlo_core.registry import create_loss
from rlo_core.runs.record import Run
from torch import Tensor

from rlo_gptq.checkpoint.load import load, weight_files
from rlo_gptq.models.source import quiet_loading
from rlo_gptq.options import Options
from rlo_gptq.pipeline.blocks import quantize_model
from rlo_gptq.pipeline.finish import write_checkpoint
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from rich.console import Console

TABLE = "A language model in 2 bits: held-out perplexity per byte, bytes on disk"
STEPS = 150
BATCH, CONTEXT = 8, 128
LOSS = "rlo-convex:k=8"
HELD_OUT = 20_000
VARIANTS = {
    "2 bits, nearest": LayerSettings(bits=2, method="nearest"),
    "2 bits, gptq": LayerSettings(bits=2, method="gptq"),
    "2 bits, ldlqRG + incoherence": LayerSettings(
        bits=2, method="ldlqRG", incoherence="hadamard", rescale=True
    ),
}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 256 tokens, one for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrap: Any = transformers.PreTrainedTokenizerFast
    wrapped: transformers.PreTrainedTokenizerFast = wrap(tokenizer_object=tokenizer)
    return wrapped


def _train(ids: Tensor, run: Run, console: Console, steps: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    criterion = create_loss(LOSS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - CONTEXT - 1, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + CONTEXT + 1] for start in starts])
        logits = model(batch[:, :-1]).logits
        loss = criterion(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step + 1 == steps:
            run.log(step=step, split="train", loss=LOSS, objective=loss.item())
        if step % 50 == 0:
            console.print(f"step {step}/{steps}, {LOSS} {loss.item():.3f}")
    return model


class _Quiet:
    def __init__(self, run: Run, variant: str) -> None:
        self.run, self.variant = run, variant

    def block(self, index: int, count: int, status: str) -> None:
        """A block begins."""

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is there."""
        self.run.log(variant=self.variant, layer=record["layer"], proxy=record["proxy"])

    def tuned(self, record: dict[str, Any]) -> None:
        """A block is finetuned: the demo does none of it."""


@quiet_loading()
def run(run_dir: Path, *, console: Console, steps: int = STEPS) -> dict[str, Any]:
    """Train, quantize, reload and evaluate; returns the summary.

    Args:
        run_dir: Where the run and the models go.
        console: Where progress and the table are shown.
        steps: Training steps.
    """
    log = Run.create(run_dir, kind="gptq demo", loss=LOSS, options={"steps": steps}, seed=0)
    text = inspect.getsource(_first) + inspect.getsource(_second)
    data = run_dir / "text"
    data.mkdir(exist_ok=True)
    (data / "train.txt").write_text(text[:-HELD_OUT], encoding="utf-8")
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    train, held = ids[: len(ids) - HELD_OUT], ids[len(ids) - HELD_OUT :]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _train(train, log, console, steps)
    folder = run_dir / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [_row("float32", model, held, folder)]
    for number, (name, layer) in enumerate(VARIANTS.items()):
        out = run_dir / f"quantized-{number}"
        shutil.rmtree(out, ignore_errors=True)
        _quantize(folder, data, out, layer, _Quiet(log, name))
        rows.append(_row(name, load(out), held, out))
        log.log(variant=name, split="held out", perplexity=rows[-1]["perplexity"])
    best = rows[-1]
    small, large = best["perplexity"], rows[0]["perplexity"]
    note = f"{best['model']} takes {best['bytes'] / rows[0]['bytes']:.0%} of the bytes of float32"
    if small == min(row["perplexity"] for row in rows[1:]):
        note += f" and comes nearest to its perplexity: {small:.2f} against {large:.2f}"
    note += "."
    show_table(TABLE, rows, console, note=note)
    summary = {
        "perplexity_float": rows[0]["perplexity"],
        "perplexity_2bit": best["perplexity"],
        "bytes_float": rows[0]["bytes"],
        "bytes_2bit": best["bytes"],
        TABLE: rows,
        "title": "a model in 2 bits",
        "notes": {TABLE: note},
    }
    log.finish(**summary)
    return summary


def _quantize(folder: Path, data: Path, out: Path, layer: LayerSettings, progress: _Quiet) -> None:
    quantize_model(
        Options(str(folder), str(data), layer, nsamples=32, seqlen=CONTEXT),
        out,
        Processes(0, 1, torch.device("cpu")),
        progress=progress,
        finish=lambda work, source, layout: write_checkpoint(
            work, source, layout, layer, base="demo", dataset="the standard library"
        ),
    )


def _row(name: str, model: Any, held: Tensor, folder: Path) -> dict[str, Any]:
    with torch.inference_mode():
        measured = perplexity(model, held, context=CONTEXT, batch_size=8)
    size = sum(file.stat().st_size for file in weight_files(folder))
    return {"model": name, "perplexity": round(measured.perplexity, 4), "bytes": size}
