"""End-to-end tuning of stories260k at 2 bits: perplexity against rates, steps, grids and seeds.

`python benchmarks/bench_tuning.py --data DIR` rounds with ldlqRG and incoherence, tunes, and
measures perplexity on stories that were neither calibrated nor trained on. Results are written
after every model, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.003, 0.01])
    parser.add_argument("--steps", type=int, nargs="*", default=[100])
    parser.add_argument("--grids", nargs="*", default=["scalar", "trellis"])
    parser.add_argument("--losses", nargs="*", default=["ce"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.jsonl"
    records = (
        [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    )
    cells = [
        {"grid": grid, "loss": loss, "steps": steps, "rate": rate, "seed": seed}
        for seed in args.seeds
        for grid in args.grids
        for loss in args.losses
        for steps in args.steps
        for rate in args.rates
    ]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        split_stories(args.data, text)
        for number, cell in enumerate(cells):
            if any(cell.items() <= record.items() for record in records):
                continue
            packed = Path(scratch) / f"packed-{cell['grid']}-{cell['seed']}"
            layer = LayerSettings(grid=cell["grid"], incoherence="hadamard", rescale=True)
            run_quantization(  # complete already for the next cell of this grid and seed
                Options(
                    model=str(args.data / "stories260k"),
                    dataset=str(text),
                    layer=layer,
                    nsamples=32,
                    seqlen=SEQLEN,
                    seed=cell["seed"],
                    split="train",
                ),
                packed,
                progress=False,
            )
            settings = EndToEndSettings(
                steps=cell["steps"],
                learning_rate=cell["rate"],
                batch=4,
                nsamples=256,
                seqlen=SEQLEN,
                loss=cell["loss"],
                evaluations=2,
                seed=cell["seed"],
            )
            out, cpu = Path(scratch) / f"tuned-{number}", time.process_time()
            tuning = Tuning(packed, str(text), settings, split="train")
            made = run_tuning(tuning, out, progress=False)
            assert made is not None
            measured = {
                name: evaluate_perplexity(
                    str(folder), str(text), context=SEQLEN, max_tokens=EVAL_TOKENS
                )["perplexity"]
                for name, folder in (("perplexity_before", packed), ("perplexity", out))
            }
            kept = ("held_out_kl_before", "held_out_kl_after", "best_step")
            taken = {"cpu_seconds": round(time.process_time() - cpu, 1)}
            records.append({**cell, **measured, **{name: made[name] for name in kept}, **taken})
            print(records[-1], flush=True)
            write_results(NAME, records)


if __name__ == "__main__":
    main()
