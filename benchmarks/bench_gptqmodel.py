"""Whole models against GPTQModel: the same model, bits, groups and calibration tokens, on one core.

    python benchmarks/bench_gptqmodel.py stories --data DIR --peer-python PYTHON
    python benchmarks/bench_gptqmodel.py smollm2 --data DIR --model DIR --peer-python PYTHON

PYTHON is the interpreter of an environment with gptqmodel (it cannot always live beside ours).
Every run is a process of its own, all are bound to one core, and candidates take turns in an order
that is shuffled each round. `seconds` is the wall time and `cpu_seconds` the processor time from
reading the model to the saved checkpoint; imports are in neither, but in `process_cpu_seconds`. All
perplexities come from one program: GPTQModel's checkpoints pass through `rlo-gptq import`.

Widths: GPTQModel takes inputs that are multiples of 32 and of the group size. So groups have 64
columns for SmolLM2 (576 inputs), and the 172 inputs of stories260k's down_proj stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from bench_models import split_stories
from harness import RESULTS, write_results
from rlo_gptq.evaluation.perplexity import evaluate_perplexity
from rlo_gptq.formats.import_gptq import import_checkpoint
from rlo_gptq.models.source import ModelSource
from rlo_gptq.options import Options
from rlo_gptq.pipeline.blocks import load_calibration
from rlo_gptq.settings import LayerSettings

BITS, GROUP = 4, 64
TIMES = ("seconds", "cpu_seconds", "process_cpu_seconds")
PEER = Path(__file__).with_name("gptqmodel_peer.py")
# gptqmodel: as it comes. Ours round in the same format, integer zeros included.
OURS = {"rlo-gptq gptq": "gptq", "rlo-gptq ldlqRG": "ldlqRG"}
PEERS: dict[str, dict[str, Any]] = {
    "gptqmodel": {},
    "gptqmodel, act_group_aware off": {"act_group_aware": False},
}


def run(command: list[str]) -> tuple[str, float]:
    """Run a program; return what it printed and its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Its thread pools refuse a single worker; all of them share the one core.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, used


OURS_PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.options import Options
from rlo_gptq.settings import LayerSettings

torch.set_num_threads(1)
request = json.loads(sys.argv[1])
layer = LayerSettings(**request["layer"])
options = Options(layer=layer, **{**request["options"], "skip": tuple(request["options"]["skip"])})
begin, cpu = time.perf_counter(), time.process_time()
run_quantization(options, Path(request["out"]), progress=False)
measured = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
print(json.dumps(measured))
"""


def quantize_ours(args: argparse.Namespace, method: str, out: Path) -> dict[str, Any]:
    layer = {"bits": BITS, "method": method, "group_size": GROUP, "integer_zero": True}
    options = {
        "model": args.model,
        "dataset": args.text,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "split": args.split,
        "skip": args.skip,
    }
    request = json.dumps({"layer": layer, "options": options, "out": str(out)})
    printed, cpu = run([sys.executable, "-c", OURS_PROGRAM, request])
    return {**json.loads(printed.splitlines()[-1]), "process_cpu_seconds": cpu}


def quantize_theirs(
    args: argparse.Namespace, options: dict[str, Any], out: Path, tokens: Path
) -> dict[str, Any]:
    request = {
        "model": args.model,
        "out": str(out),
        "tokens": str(tokens),
        "bits": BITS,
        "group_size": GROUP,
        "skip": args.skip,
        "options": options,
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(request))
    printed, cpu = run([args.peer_python, str(PEER), str(file)])
    measured = json.loads(printed.rpartition("PEER ")[2])
    del measured["options"]
    return {**measured, "process_cpu_seconds": cpu}


def calibration(args: argparse.Namespace, file: Path) -> None:
    """Write the sequences that our program draws, for the peer."""
    options = Options(
        model=args.model,
        dataset=args.text,
        layer=LayerSettings(),
        nsamples=args.nsamples,
        split=args.split,
    )
    source = cast("ModelSource", SimpleNamespace(folder=Path(args.model)))
    sequences, _ = load_calibration(options, source, args.seqlen)
    file.write_text(json.dumps(sequences.tolist()))


def evaluated(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    if (folder / "quantize_config.json").is_file():
        shutil.rmtree(scratch, ignore_errors=True)
        folder = import_checkpoint(folder, scratch).folder
    found = evaluate_perplexity(
        str(folder), args.text, context=args.context, max_tokens=args.eval_tokens
    )
    return {key: found[key] for key in ("perplexity", "tokens", "bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["stories", "smollm2"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="folder of SmolLM2-135M in safetensors")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="candidates; by default all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.which == "stories":
            args.model, args.skip, args.split = (
                str(args.data / "stories260k"),
                ["*.down_proj"],
                "train",
            )
            (work / "text").mkdir()
            args.text = str(split_stories(args.data, work / "text"))
        else:
            args.text, args.skip, args.split = str(args.data / "wikitext2-raw"), [], "validation"
        tokens = work / "tokens.json"
        calibration(args, tokens)
        names = [n for n in (*OURS, *PEERS) if not args.only or n in args.only]
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        shuffle = random.Random(0).shuffle
        for number in range(args.rounds):
            shuffle(names)
            for name in names:
                out = work / f"{name.replace(' ', '-').replace(',', '')}-{number}"
                measured[name].append(
                    quantize_ours(args, OURS[name], out)
                    if name in OURS
                    else quantize_theirs(args, PEERS[name], out, tokens)
                )
                print(name, measured[name][-1], flush=True)
                if number:
                    shutil.rmtree(out)
        original = evaluate_perplexity(
            args.model, args.text, context=args.context, max_tokens=args.eval_tokens
        )
        shared = {
            "model": args.which,
            "blocks": json.loads((Path(args.model) / "config.json").read_text())[
                "num_hidden_layers"
            ],
            "bits": BITS,
            "group_size": GROUP,
            "nsamples": args.nsamples,
            "seqlen": args.seqlen,
            "rounds": args.rounds,
        }
        records.append(
            {**shared, "what": "original", **{k: original[k] for k in ("perplexity", "tokens")}}
        )
        for name, runs in measured.items():
            out = work / f"{name.replace(' ', '-').replace(',', '')}-0"
            record = {
                **shared,
                "what": name,
                **{key: statistics.median(r[key] for r in runs) for key in TIMES},
                **{f"{key}_each": [r[key] for r in runs] for key in TIMES},
                "version": runs[0].get("version"),
                **evaluated(args, out, work / "imported"),
            }
            records.append(record)
            print(json.dumps(record), flush=True)
    # Other records stay.
    path = RESULTS / "gptqmodel.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    key = itemgetter("model", "blocks", "what")
    new = {key(record) for record in records}
    write_results("gptqmodel", [r for r in kept if key(r) not in new] + records)


if __name__ == "__main__":
    main()
