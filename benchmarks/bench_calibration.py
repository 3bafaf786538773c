"""What calibration can add to ldlqRG with incoherence: weighted Hessians and finetuned blocks.

`python benchmarks/bench_calibration.py --data DIR` quantizes stories260k at 2 and 3 bits in every
variant with four seeds (of calibration sample and rotation) and measures perplexity on stories that
were not calibrated on. Results are written after every model, and a run that was stopped goes on;
`--minutes N` begins no model after that time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import split_stories
from harness import RESULTS, write_results
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.options import Options
from rlo_gptq.settings import LayerSettings, TuneSettings

NAME = "calibration_stories"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tune": {"tune": TuneSettings()},
    "rlo:k=5": {"hessian": "rlo:k=5"},
    "rlo:k=5 energy": {"hessian": "rlo:k=5", "hessian_energy": True},
    "rlo-convex": {"hessian": "rlo-convex"},
    "trellis": {"grid": "trellis"},
    "trellis tune": {"grid": "trellis", "tune": TuneSettings()},
}
NSAMPLES, SEQLEN, EVAL_TOKENS = 32, 512, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    path = RESULTS / f"{NAME}.jsonl"
    records = (
        [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    )
    cells = [
        {"bits": bits, "variant": variant, "seed": seed}
        for seed in args.seeds
        for bits in args.bits
        for variant in args.variants
        if not (bits != 2 and "trellis" in variant)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        split_stories(args.data, text)
        for number, cell in enumerate(cells):
            if any(cell.items() <= record.items() for record in records):
                continue
            if time.monotonic() - started > 60 * args.minutes:
                break
            chosen = dict(VARIANTS[cell["variant"]])
            options = Options(
                model=str(args.data / "stories260k"),
                dataset=str(text),
                layer=LayerSettings(
                    bits=cell["bits"],
                    grid=chosen.pop("grid", "scalar"),
                    incoherence="hadamard",
                    rescale=True,
                ),
                nsamples=NSAMPLES,
                seqlen=SEQLEN,
                seed=cell["seed"],
                split="train",
                **chosen,
            )
            folder, cpu = Path(scratch) / f"model-{number}", time.process_time()
            made = run_quantization(options, folder, progress=False)
            assert made is not None
            taken = round(time.process_time() - cpu, 2)
            result = evaluate_perplexity(
                str(folder), str(text), context=SEQLEN, max_tokens=EVAL_TOKENS
            )
            errors = {k: made[k] for k in made if k in ("mean_proxy",) or k.startswith("block_")}
            measured = {key: result[key] for key in ("perplexity", "ce", "tokens", "bytes")}
            shape = {"nsamples": NSAMPLES, "seqlen": SEQLEN, "cpu_seconds": taken}
            records.append({**cell, **measured, **errors, **shape})
            print(records[-1], flush=True)
            write_results(NAME, records)


if __name__ == "__main__":
    main()
