"""LoRA on 2- and 3-bit models: held-out perplexity before and after, by loss and by beginning.

`python benchmarks/finetune_quantized.py stories260k --data DIR` quantizes stories260k with ldlqRG
and incoherence and finetunes adapters on TinyStories, for every bit width, loss, beginning and
seed (of calibration, rotation, adapters and order of data). `... smollm2 --model FILE.gguf` does so
for SmolLM2-135M on WikiText-2's validation text, measured on its test text. Results are written
after every model, and a run that was stopped goes on; `--minutes N` begins none after that time.
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
from rlo_gptq.cli.merge import merge_adapter
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.options import Options
from rlo_gptq.settings import LayerSettings, TuneSettings
from rlo_hf.finetuning.options import FinetuneOptions
from rlo_hf.finetuning.run import finetune


def merge(
    out: Path, text: Path, train: str, context: int, args: argparse.Namespace
) -> dict[str, float]:
    """Merge the adapter with and without tuning; return the perplexities."""
    found = {}
    for name, tune in (("perplexity_merged", False), ("perplexity_merged_tuned", True)):
        folder = out / name
        changes = {"split": train}
        merge_adapter(out / "adapter", str(text), folder, changes=changes, tune=tune)
        measured = evaluate_perplexity(
            str(folder), str(text), context=context, max_tokens=args.eval_tokens
        )
        found[name] = measured["perplexity"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["stories260k", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--losses", nargs="*", default=["ce", "rlo:k=5"])
    parser.add_argument("--inits", nargs="*", default=["default"])
    parser.add_argument("--tune", action="store_true", help="finetune blocks before")
    parser.add_argument("--merge", action="store_true", help="measure the merged model too")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--name")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    name = args.name or f"finetune_quantized_{args.which}"
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    records = [json.loads(line) for line in lines]
    stories = args.which == "stories260k"
    shape = {"steps": args.steps, "lr": args.lr, "block": args.block, "batch_size": args.batch_size}
    shape |= {"tune": args.tune, "nsamples": args.nsamples}
    if args.merge:
        shape["merge"] = True
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if stories:
            model, text = str(args.data / "stories260k"), work / "text"
            text.mkdir()
            split_stories(args.data, text)
        else:
            model, text = args.model, args.data / "wikitext2-raw"
        train, context = ("train", 512) if stories else ("validation", 1024)
        for seed in args.seeds:
            for bits in args.bits:
                for loss in args.losses:
                    for init in args.inits:
                        cell = {"bits": bits, "loss": loss, "init": init, "seed": seed, **shape}
                        if any(cell.items() <= record.items() for record in records):
                            continue
                        if time.monotonic() - started > 60 * args.minutes:
                            return
                        packed = work / f"packed-{bits}-{seed}"
                        if not packed.exists():
                            layer = LayerSettings(bits=bits, incoherence="hadamard", rescale=True)
                            options = Options(
                                model=model,
                                dataset=str(text),
                                layer=layer,
                                nsamples=args.nsamples,
                                seqlen=512,
                                seed=seed,
                                split=train,
                                tune=TuneSettings() if args.tune else None,
                            )
                            run_quantization(options, packed, progress=False)
                        out = work / f"{bits}-{loss}-{init}-{seed}"
                        cpu = time.process_time()
                        summary = finetune(
                            FinetuneOptions(
                                model=str(packed),
                                dataset=str(text),
                                loss=loss,
                                out=str(out),
                                max_steps=args.steps,
                                block=args.block,
                                batch_size=args.batch_size,
                                accumulation=1,
                                learning_rate=args.lr,
                                seed=seed,
                                train_split=train,
                                eval_split="test",
                                eval_context=context,
                                eval_tokens=args.eval_tokens,
                                lora=8,
                                lora_init=init,
                                original=model if init == "loftq" else None,
                            ),
                            save=out / "adapter",
                        ).summary()
                        merged = merge(out, text, train, context, args) if args.merge else {}
                        keys = ("perplexity_before", "perplexity_after", "eval_tokens")
                        records.append(
                            {
                                **cell,
                                **{key: summary[key] for key in keys},
                                **merged,
                                "cpu_seconds": round(time.process_time() - cpu, 1),
                            }
                        )
                        print(records[-1], flush=True)
                        write_results(name, records)


if __name__ == "__main__":
    main()
