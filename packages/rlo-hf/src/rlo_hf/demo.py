"""The demo's language-model part: a tiny Llama reads Python's own documentation.

It is trained with cross entropy on the docstrings of the standard library, then finetuned on half
of the language reference (`pydoc_data.topics`) under several losses. The other half is held out.
All of the text comes with Python.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.demo.digits import show_table
from rlo_core.errors import RLOError
from rlo_core.lm.perplexity import perplexity
from rlo_core.runs.record import Run
from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.console import Console

LOSSES = ("ce", "dft", "rlo:k=5,m=5")
TABLE = "A tiny language model, finetuned on Python's language reference"
VOCABULARY = 768
BLOCK = 64
BATCH = 16


def docstrings(characters: int = 600_000) -> str:
    """Return docstrings of the standard library's modules, functions and classes, in path order."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    total = 0
    for path in sorted(folder.glob("*.py")):
        for text in _docstrings_of(path):
            found.append(text)
            total += len(text)
        if total > characters:
            break
    if total < characters // 4:
        raise RLOError(f"the standard library in {str(folder)!r} has no sources with docstrings")
    return "\n\n".join(found)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text


def reference() -> tuple[str, str]:
    """Return the language reference, every other topic for training and the others held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RLOError("this Python comes without its language reference") from error
    texts = [topics[name] for name in sorted(topics)]
    return "\n\n".join(texts[::2]), "\n\n".join(texts[1::2])


def demo(
    run_dir: Path,
    *,
    console: Console,
    losses: tuple[str, ...] = LOSSES,
    pretraining: int = 150,
    finetuning: int = 100,
) -> dict[str, Any]:
    """Train, finetune under each loss, and measure held-out perplexity before and after.

    Args:
        run_dir: Where `run.json` and `metrics.jsonl` go.
        console: Where progress and the table are shown.
        losses: Spec strings.
        pretraining: Updates on docstrings.
        finetuning: Updates on the language reference, for each loss.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    general = docstrings()
    train, held = reference()
    tokenizer = _tokenizer(general)
    ids = {
        name: torch.tensor(tokenizer.encode(text).ids)
        for name, text in (("general", general), ("train", train), ("held", held))
    }
    run = Run.create(
        run_dir,
        kind="demo llm",
        options={"losses": losses, "pretraining": pretraining, "finetuning": finetuning},
        seed=0,
        data={
            "name": "Python's docstrings and language reference",
            "fingerprint": hashlib.sha256((general + train + held).encode()).hexdigest()[:16],
            **{f"{name}_tokens": len(part) for name, part in ids.items()},
        },
    )
    rows: list[dict[str, Any]] = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("llm, docstrings", total=pretraining + len(losses) * finetuning)

        def advance(step: int, loss: float) -> None:
            bar.advance(task)

        start = _model()
        _train(start, ids["general"], "ce", pretraining, 3e-3, advance)
        before = perplexity(start, ids["held"], context=256, batch_size=8, max_tokens=16_384)
        for loss in losses:
            bar.update(task, description=f"llm, {loss}")
            run.log(loss=loss, step=0, split="held out", perplexity=before.perplexity, ce=before.ce)
            model = copy.deepcopy(start)
            _train(model, ids["train"], loss, finetuning, 1e-3, advance)
            after = perplexity(model, ids["held"], context=256, batch_size=8, max_tokens=16_384)
            run.log(
                loss=loss,
                step=finetuning,
                split="held out",
                perplexity=after.perplexity,
                ce=after.ce,
            )
            rows.append(
                {
                    "loss": loss,
                    "perplexity before": round(before.perplexity, 2),
                    "perplexity after": round(after.perplexity, 2),
                    "held-out tokens": after.tokens,
                }
            )
    note = _note(rows)
    show_table(TABLE, rows, console, note=note)
    summary: dict[str, Any] = {
        "trainings": 1 + len(losses),
        TABLE: rows,
        "title": "a language model",
        "notes": {TABLE: note},
    }
    run.finish(**summary)
    return summary


def _tokenizer(text: str) -> Any:
    """Return a byte-level BPE tokenizer of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def _model() -> nn.Module:
    """Return a Llama of two layers, 0.2 million parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _train(
    model: nn.Module, ids: Tensor, loss: str, steps: int, learning_rate: float, advance: Any
) -> None:
    """Train with `set_loss`, for one's own training loop."""
    from rlo_hf.model_loss import set_loss

    set_loss(model, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    starts = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        first = torch.randint(len(ids) - BLOCK, (BATCH, 1), generator=starts)
        batch = ids[first + torch.arange(BLOCK)]
        value = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance(step, float(value.detach()))


def _note(rows: list[dict[str, Any]]) -> str:
    best = min(rows, key=lambda row: row["perplexity after"])
    return (
        f"Lower is better, and {best['loss']} ends lowest, at {best['perplexity after']:.1f}. "
        "Perplexity is what cross entropy minimises: another loss has to be good at something else."
    )
