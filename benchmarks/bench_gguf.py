"""GGUF types: ours against llama.cpp's own quantizer, at the same types and bytes, in llama.cpp.

    python benchmarks/bench_gguf.py NAME --model MODEL --calibration TEXT --evaluation TEXT \
        --types Q4_0 Q4_K_M

Both files have the same type for every tensor; llama.cpp's gets an importance matrix from the very
sequences that ours is calibrated on. Every perplexity is measured by llama.cpp. Results are
appended after each type to `results/gguf.jsonl`; a type that is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import RESULTS, write_results

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from verify_gguf import (
    calibration,
    check_file,
    environment,
    in_llama_cpp,
    peer_file,
    windows_of,
)


def earlier() -> list[dict[str, object]]:
    path = RESULTS / "gguf.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def tokens_a_second(model: str, count: int) -> float:
    """Decode greedily with the dense model in bfloat16, one thread: tokens a CPU second."""
    from rlo_gptq.models.source import find_model
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(find_model(model), dtype=torch.bfloat16)
    ids = torch.arange(3, 11)[None]
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    with torch.no_grad():
        dense.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)
        begin = time.process_time()
        dense.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
    return count / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-split")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--types", nargs="+", required=True)
    parser.add_argument("--method", default="ldlqRG")
    parser.add_argument("--rotate", choices=["fold"])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--environment", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from rlo_gptq.options import Options
    from rlo_gptq.pipeline.run import run_quantization
    from rlo_gptq.settings import LayerSettings

    python = environment(args.environment) if args.environment else environment()
    sequences = calibration(
        args.model, args.calibration, args.calibration_split, args.nsamples, args.seqlen
    )
    windows = windows_of(args.model, args.evaluation, None, args.context, args.windows)
    records = earlier()
    fixed = {"model": args.name, "nsamples": args.nsamples, "seqlen": args.seqlen}

    def measured(path: Path) -> float:
        found = in_llama_cpp(python, task="perplexity", path=path, windows=windows)
        return round(float(found["perplexity"]), 4)

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for kind in args.types:
            key = {**fixed, "type": kind, "method": args.method, "rotate": args.rotate}
            if any(key.items() <= record.items() for record in records):
                continue
            options = Options(
                model=args.model,
                dataset=args.calibration,
                layer=LayerSettings(method=args.method),
                nsamples=args.nsamples,
                seqlen=args.seqlen,
                split=args.calibration_split,
                rotate=args.rotate,
                gguf=kind,
            )
            begin = time.process_time()
            made = run_quantization(options, work / kind, progress=False)
            assert made is not None
            seconds = time.process_time() - begin
            path = next((work / kind).glob("*.gguf"))
            peer = peer_file(python, path, args.model, sequences, work, name=f"peer-{kind}")
            dense = next((r["dense"] for r in records if r["model"] == args.name), None)
            prompt = windows[0][:8]
            fast = in_llama_cpp(python, task="speed", path=path, prompt=prompt, count=64)
            checked = check_file(python, path)
            record = {
                **key,
                "dense": dense or measured(work / "dense.gguf"),
                "ours": measured(path),
                "llama.cpp": measured(peer),
                "bytes": path.stat().st_size,
                "llama.cpp_bytes": peer.stat().st_size,
                "bits_per_weight": made["bits_per_weight"],
                "mean_proxy": made["mean_proxy"],
                "quantize_cpu_seconds": round(seconds, 1),
                "tokens": sum(len(window) - 1 for window in windows),
                "context": args.context,
                "tokens_per_cpu_second": round(fast["per_cpu_second"], 1),
                "transformers_bf16_tokens_per_cpu_second": round(
                    tokens_a_second(args.model, 64), 1
                ),
                **{name: checked[name] for name in checked if name != "generated"},
            }
            records.append(record)
            print(record, flush=True)
            write_results("gguf", records)


if __name__ == "__main__":
    main()
