"""Bits chosen for each layer against the same bits for all, at the same size: perplexity.

`python benchmarks/bench_mixed.py stories --data DIR --work DIR` quantizes stories260k with several
seeds; `... smollm2 --data DIR --model GGUF --work DIR` SmolLM2-135M. A mixed model has at most the
bytes of the uniform one of its average bits; where there is none (2.5), cross entropy is
interpolated between the measured uniform models next to it by bytes, and the record says so.
Probes are kept in the work folder, results are written after every model, and a run that was
stopped goes on; `--minutes N` begins nothing after that time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import split_stories
from harness import RESULTS, write_results
from rlo_gptq.allocation.run import choose_bits
from rlo_gptq.budget import Budget
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.options import Options
from rlo_gptq.pipeline.run import run_quantization
from rlo_gptq.settings import LayerSettings


def earlier(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def with_uniform(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say beside each mixed model the best that uniform ones of its size reach.

    Uniform models with one width of the embedding make a line; measured at the size itself or
    between two, and the lowest of the lines counts.
    """
    for record in records:
        if record["bits"] != "mixed":
            continue
        same = ("seed", "method", "nsamples", "seqlen")
        lines: dict[Any, list[tuple[int, float, int]]] = {}
        for r in records:
            if isinstance(r["bits"], int) and all(r[key] == record[key] for key in same):
                line = lines.setdefault(r.get("uniform_embed_bits"), [])
                line.append((r["bytes"], r["ce"], r["bits"]))
        reached = []
        for embed, points in lines.items():
            below = [p for p in sorted(points) if p[0] <= record["budget_bytes"]]
            above = [p for p in sorted(points) if p[0] >= record["budget_bytes"]]
            if not below or not above:
                continue
            (a, low, first), (b, high, last) = below[-1], above[0]
            share = 0.0 if a == b else (record["budget_bytes"] - a) / (b - a)
            how = f"{first} bits" if a == b else f"between {first} and {last} bits, by bytes"
            named = "recommended" if embed is None else f"{embed} bits"
            reached.append((low + share * (high - low), f"{how}; embedding {named}"))
        if reached:
            ce, record["uniform"] = min(reached)
            record["uniform_perplexity"] = math.exp(ce)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["stories", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--averages", nargs="*", type=float, default=[2.5, 3])
    parser.add_argument("--uniform", nargs="*", type=int, default=[2, 3])
    parser.add_argument("--embed-bits", type=int, help="of the uniform models; 8 if left out")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--method", default="ldlqRG")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--probe-tokens", type=int, default=1024)
    parser.add_argument("--eval-tokens", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.which == "stories":
        model, text = str(args.data / "stories260k"), args.work / "text"
        text.mkdir(exist_ok=True)
        split_stories(args.data, text)
        calibration = "train"
    else:
        model, text, calibration = args.model, args.data / "wikitext2-raw", "validation"
    measure = {"context": args.context, "max_tokens": args.eval_tokens}
    keys = ("perplexity", "ce", "tokens", "context", "bytes")
    name = f"mixed_{args.which}"
    records = earlier(name)

    def late() -> bool:
        return time.monotonic() - started > 60 * args.minutes

    if not records:
        dense = evaluate_perplexity(model, str(text), **measure)
        records.append({"bits": "dense", **{key: dense[key] for key in keys}})
        write_results(name, records)
    wanted: list[tuple[int, float | None, int | None]] = [
        (seed, average, bits)
        for seed in args.seeds
        for average, bits in [
            *((a, None) for a in args.averages),
            *((None, b) for b in args.uniform),
        ]
    ]
    for seed, average, bits in wanted:
        setting = {
            "bits": "mixed" if bits is None else bits,
            "average_bits": average,
            "seed": seed,
            "method": args.method,
            "nsamples": args.nsamples,
            "seqlen": args.seqlen,
            **(
                {}
                if bits is None or not args.embed_bits
                else {"uniform_embed_bits": args.embed_bits}
            ),
        }
        plain = "uniform_embed_bits" not in setting
        if late() or any(
            setting.items() <= r.items() and plain == ("uniform_embed_bits" not in r)
            for r in records
        ):
            continue
        options = Options(
            model=model,
            dataset=str(text),
            layer=LayerSettings(
                bits=bits or 2, method=args.method, incoherence="hadamard", rescale=True
            ),
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            seed=seed,
            split=calibration,
            embed_bits=None if average is not None else args.embed_bits,
        )
        extra: dict[str, Any] = {}
        cpu = time.process_time()
        if average is not None:
            options, shown = choose_bits(
                options,
                args.work / f"probes-{seed}-{args.method}",
                Budget(average_bits=average),
                tokens=args.probe_tokens,
                note=lambda index, count, status: print(status, index, count, flush=True),
            )
            names = ("budget_bytes", "mean_bits", "predicted_kl", "kinds")
            extra = {key: shown[key] for key in names}
            extra["probe_cpu_seconds"] = round(time.process_time() - cpu, 1)
            if late():
                break
        folder = args.work / f"model-{seed}-{average}-{bits}"
        cpu = time.process_time()
        made = run_quantization(options, folder, progress=False)
        assert made is not None
        seconds = round(time.process_time() - cpu, 1)
        result = evaluate_perplexity(str(folder), str(text), **measure)
        shutil.rmtree(folder)
        if result["tokens"] != records[0]["tokens"]:
            parser.error(f"--eval-tokens and --context must be those of {records[0]}")
        records.append(
            {
                **setting,
                **{key: result[key] for key in keys},
                "embed_bits": options.embed_bits if bits is None else made["embedding"],
                **extra,
                "quantize_cpu_seconds": seconds,
            }
        )
        write_results(name, with_uniform(records))
        print({k: v for k, v in records[-1].items() if k != "kinds"}, flush=True)


if __name__ == "__main__":
    main()
