"""End-to-end tuning of stories260k: perplexity against rates, steps, grids, losses and seeds.

`python benchmarks/bench_tuning.py --data DIR --vary grid=scalar,trellis seed=0,1,2,3 steps=100,400`
rounds with ldlqRG and incoherence, tunes, and measures perplexity on stories that were neither
calibrated nor trained on. A cell is a combination of the values that are varied, the rest is
`CELL`. Results are written after every cell, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import split_stories
from harness import RESULTS, write_results
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.options import Options
from rlo_gptq.pipeline.run import run_quantization
from rlo_gptq.settings import EndToEndSettings, LayerSettings
from rlo_gptq.tuning.run import Tuning, run_tuning

NAME = "tuning_stories"
SEQLEN, EVAL_TOKENS = 512, 20_000
# `ends` are the bits of the embedding and of the head, which is tied to it.
CELL: dict[str, Any] = {
    "grid": "scalar",
    "bits": 2,
    "ends": 8,
    "loss": "ce",
    "steps": 100,
    "rate": 0.01,
    "batch": 4,
    "nsamples": 256,
    "top_k": 64,
    "seed": 0,
}
ROUNDED = ("grid", "bits", "ends", "seed")


def cells_of(varied: list[str]) -> list[dict[str, Any]]:
    """`NAME=VALUE,VALUE` for each that is varied, to all combinations; the first varies slowest."""
    lists = {}
    for word in varied:
        name, _, values = word.partition("=")
        lists[name] = [type(CELL[name])(value) for value in values.split(",")]
    return [
        {**CELL, **dict(zip(lists, values, strict=True))}
        for values in itertools.product(*lists.values())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vary", nargs="*", default=["seed=0,1,2,3", "grid=scalar,trellis"])
    parser.add_argument("--scratch", type=Path, help="keeps packed models from run to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.jsonl"
    records = (
        [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        scratch = args.scratch or Path(temporary)
        text = scratch / "text"  # its name is among what a packed model remembers
        text.mkdir(exist_ok=True)
        split_stories(args.data, text)

        @functools.cache
        def perplexity(folder: Path) -> float:
            measured = evaluate_perplexity(
                str(folder), str(text), context=SEQLEN, max_tokens=EVAL_TOKENS
            )
            return float(measured["perplexity"])

        for number, cell in enumerate(cells_of(args.vary)):
            if any(cell.items() <= record.items() for record in records):
                continue
            model = args.data / "stories260k"
            packed = scratch / "-".join(str(cell[name]).replace(":", "_") for name in ROUNDED)
            layer = LayerSettings(
                bits=cell["bits"], grid=cell["grid"], incoherence="hadamard", rescale=True
            )
            cpu = time.process_time()
            run_quantization(  # complete already for the next cell with this rounding
                Options(
                    model=str(model),
                    dataset=str(text),
                    layer=layer,
                    nsamples=32,
                    seqlen=SEQLEN,
                    seed=cell["seed"],
                    split="train",
                    embed_bits=cell["ends"],
                ),
                packed,
                progress=False,
            )
            settings = EndToEndSettings(
                steps=cell["steps"],
                learning_rate=cell["rate"],
                batch=cell["batch"],
                nsamples=cell["nsamples"],
                seqlen=SEQLEN,
                top_k=cell["top_k"],
                loss=cell["loss"],
                evaluations=4,
                seed=cell["seed"],
            )
            rounding, cpu = time.process_time() - cpu, time.process_time()
            out = Path(temporary) / f"tuned-{number}"
            tuning = Tuning(packed, str(text), settings, original=str(model), split="train")
            made = run_tuning(tuning, out, progress=False)
            assert made is not None
            taken = {
                "rounding_cpu_seconds": round(rounding, 1),
                "tuning_cpu_seconds": round(time.process_time() - cpu, 1),
            }
            measured = {
                "perplexity_dense": perplexity(model),
                "perplexity_before": perplexity(packed),
                "perplexity": perplexity(out),
            }
            kept = ("held_out_kl_before", "held_out_kl_after", "best_step", "bytes")
            records.append({**cell, **measured, **{name: made[name] for name in kept}, **taken})
            print(records[-1], flush=True)
            write_results(NAME, records)


if __name__ == "__main__":
    main()
