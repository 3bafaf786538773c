"""Whole models: bits x methods x incoherence -> perplexity, bytes, seconds.

`python benchmarks/bench_models.py stories --data DIR` quantizes stories260k;
`... smollm2 --data DIR --model DIR_OR_GGUF` SmolLM2-135M. DIR is the folder of real data, texts for
calibration and for evaluation do not overlap. Results are written after every model, and a run that
was stopped goes on; `--minutes N` begins no model after that time, to do the table piece by piece.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write_results
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.options import Options
from rlo_gptq.settings import LayerSettings

METHODS = ("nearest", "gptq", "ldlq", "ldlqRG", "allbal", "ldlbal_admm")
HELD_OUT = 400


def split_stories(data: Path, folder: Path) -> Path:
    """The last 400 stories are for evaluation; the tokenizer puts <s> in front of each."""
    text = (data / "tinystories-sample" / "stories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    parts = {"train": stories[:-HELD_OUT], "test": stories[-HELD_OUT:]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part), encoding="utf-8")
    return folder


def configurations(names: list[str]) -> list[dict[str, Any]]:
    """`BITS:METHOD[:hadamard|kronecker][:rescale][:trellis]` for each, e.g. `2:ldlqRG:hadamard`."""
    found = []
    for name in names:
        bits, method, *rest = name.split(":")
        rotations = [word for word in rest if word in ("hadamard", "kronecker")]
        found.append(
            {
                "bits": int(bits),
                "method": method,
                "grid": "trellis" if "trellis" in rest else "scalar",
                "incoherence": rotations[0] if rotations else "none",
                "rescale": "rescale" in rest,
            }
        )
    return found


def earlier(name: str) -> list[dict[str, Any]]:
    """Return the records that are there already; delete the file to start afresh."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["stories", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--configs", nargs="*")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="layers to leave, in a file NAME_part"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    names = args.configs or [
        f"{bits}:{method}{incoherence}"
        for bits in (2, 3, 4)
        for method in METHODS
        for incoherence in ("", ":hadamard:rescale")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if args.which == "stories":
            model, text = str(args.data / "stories260k"), work / "text"
            text.mkdir()
            split_stories(args.data, text)
        else:
            model, text = args.model, args.data / "wikitext2-raw"
        measure = {"context": args.context, "max_tokens": args.eval_tokens}
        calibration = "train" if args.which == "stories" else "validation"
        keys = ("perplexity", "ce", "tokens", "context", "bytes")
        name = f"models_{args.which}" + ("_part" if args.skip else "")
        records = earlier(name)
        if not records:
            original = evaluate_perplexity(model, str(text), **measure)
            records.append({"method": "original", **{key: original[key] for key in keys}})
            write_results(name, records)
        for number, settings in enumerate(configurations(names)):
            if any(settings.items() <= record.items() for record in records):
                continue  # a run that was stopped goes on
            if time.monotonic() - started > 60 * args.minutes:
                break
            folder = work / f"model-{number}"
            options = Options(
                model=model,
                dataset=str(text),
                layer=LayerSettings(**settings),
                nsamples=args.nsamples,
                seqlen=args.seqlen,
                split=calibration,
                skip=tuple(args.skip),
            )
            begin, cpu = time.perf_counter(), time.process_time()
            made = run_quantization(options, folder, progress=False)
            assert made is not None
            taken = {
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "wall_seconds": round(time.perf_counter() - begin, 2),
            }
            result = evaluate_perplexity(str(folder), str(text), **measure)
            if result["tokens"] != records[0]["tokens"]:
                parser.error(f"--eval-tokens and --context must be those of {records[0]}")
            records.append(
                {
                    **settings,
                    **{key: result[key] for key in keys},
                    **taken,
                    "mean_proxy": made["mean_proxy"],
                    "bits_per_weight": made["bits_per_weight"],
                    "nsamples": args.nsamples,
                    "seqlen": args.seqlen,
                    "calibration": calibration,
                    "skip": args.skip,
                }
            )
            print(records[-1], flush=True)
            write_results(name, records)


if __name__ == "__main__":
    main()
