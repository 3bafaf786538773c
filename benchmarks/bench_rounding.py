"""Rounding: seconds against a column-by-column form, loss against the authors' algorithm.

    python benchmarks/bench_rounding.py                    # everything that needs no model
    python benchmarks/bench_rounding.py --only speed
    python benchmarks/bench_rounding.py --model FOLDER --text FILE   # real layers too

The reference is written from the formulas, with the complexity of the authors' program: every
column of every pass costs one product of the whole (m, d) error with a column of the Hessian. Its
cost per greedy column does not depend on the column, and that of feedback is linear in it, so that
a sample of evenly spaced columns is timed and scaled up; `reference_columns` says how many.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, compare, write_results
from rlo_gptq.rounding.greedy import greedy_pass, start
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.rounding.methods import round_matrix
from rlo_gptq.settings import LayerSettings
from rlo_gptq.synthetic import make_layer
from torch import Tensor

PASSES = 10
TURNED = {"incoherence": "hadamard", "rescale": True}
AUTHORS = {
    "compat": "quip",
    "incoherence": "kronecker",
    "incoherence_sides": "both",
    "rescale": True,
}


def quick_layer(m: int, d: int) -> tuple[Tensor, Tensor]:
    """Gaussian weights and a full-rank Hessian: speed does not depend on the values."""
    x = torch.randn(2 * d, d) * torch.arange(1, d + 1) ** -0.45
    return torch.randn(m, d), x.T @ x / d + 0.01 * torch.eye(d)


def reference_feedback(W: Tensor, H: Tensor, columns: list[int]) -> None:
    lower = torch.linalg.cholesky(H)
    lower = lower / lower.diagonal()
    lower.diagonal().zero_()
    codes = W.clone()
    for i in columns:
        x = W[:, i] + (W[:, i:] - codes[:, i:]) @ lower[i:, i]
        codes[:, i] = x.round().clamp(0, 3)


def reference_pass(error: Tensor, codes: Tensor, H: Tensor, columns: list[int]) -> None:
    for i in columns:
        step = codes[:, i] - (codes[:, i] - error @ H[:, i] / H[i, i]).round()
        codes[:, i] -= step
        error[:, i] -= step


def speed(m: int, d: int, sample: int, rounds: int) -> dict[str, Any]:
    """Time ldlqRG with ten passes, scale fits included, against the reference in the same run."""
    W, H = quick_layer(m, d)
    spaced = torch.linspace(0, d - 1, sample).round().long().flip(0).tolist()
    options = LayerSettings(bits=2, npasses=PASSES)
    weight = W.T.contiguous()
    codes = W.round().clamp(0, 3)
    error = codes - W
    first = round_matrix(weight, H, LayerSettings(bits=2, npasses=0), seed=0)
    state = start(weight, H, first.codes.to(weight), first.grid, torch.arange(d))
    times = compare(
        {
            "reference feedback": lambda: reference_feedback(W, H, spaced),
            "reference pass": lambda: reference_pass(error.clone(), codes.clone(), H, spaced),
            "cholesky": lambda: torch.linalg.cholesky(H),
            "ours": lambda: round_matrix(weight, H, options, seed=0),
            "our pass": lambda: greedy_pass(state, first.grid),
        },
        rounds=rounds,
        warmup=0,
    )
    t = {name: value["median"] for name, value in times.items()}
    scale = d / sample
    feedback = t["cholesky"] + scale * (t["reference feedback"] - t["cholesky"])
    reference = feedback + PASSES * scale * t["reference pass"]
    record = {
        "what": "speed",
        "m": m,
        "d": d,
        "rounds": rounds,
        "reference_columns": sample,
        "reference_feedback_s": feedback,
        "reference_pass_s": scale * t["reference pass"],
        "reference_s": reference,
        "ours_s": t["ours"],
        "our_pass_s": t["our pass"],
        "times_faster": reference / t["ours"],
    }
    print(json.dumps(record))
    return record


def losses(name: str, layers: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Compare losses on some layers; one record for every number of bits."""
    seeds = range(len(layers))
    records = []
    for bits in (2, 3, 4):
        candidates: dict[str, dict[str, Any]] = {
            "authors ldlqRG + incoherence, 10 passes": {**AUTHORS, "npasses": PASSES},
            "authors gptq + incoherence": {**AUTHORS, "method": "gptq"},
            "gptq": {"method": "gptq"},
            "ldlqRG": {},
            "nearest + incoherence": {"method": "nearest", **TURNED},
            "gptq + incoherence": {"method": "gptq", **TURNED},
            "ldlqRG + incoherence": TURNED,
            "ldlqRG + incoherence, groups of 128": {**TURNED, "group_size": 128},
            "ldlqRG + incoherence, integer zero": {**TURNED, "integer_zero": True},
        }
        if bits == 2:
            candidates["trellis ldlqRG + incoherence"] = {**TURNED, "grid": "trellis"}
        values = {
            candidate: [
                quantize_layer(W, H, LayerSettings(bits=bits, **options), seed=seed).proxy
                for (W, H), seed in zip(layers, seeds, strict=True)
            ]
            for candidate, options in candidates.items()
        }
        authors = values["authors ldlqRG + incoherence, 10 passes"]
        records.append(
            {
                "what": "loss",
                "layers": name,
                "bits": bits,
                "mean": {k: sum(v) / len(v) for k, v in values.items()},
                "each": values,
                # The mean over layers of each layer's ratio to the authors' algorithm.
                "ratio": {
                    k: sum(a / b for a, b in zip(v, authors, strict=True)) / len(v)
                    for k, v in values.items()
                },
            }
        )
        print(json.dumps(records[-1]))
    return records


def real_layers(model: Path, text: Path, blocks: list[int], tokens: int) -> list[dict[str, Any]]:
    """Collect Hessians of some blocks from a real model's own activations on real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = sorted(model.glob("*.gguf"))
    where = {"gguf_file": gguf[0].name} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(model, **where)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **where).eval()
    ids = tokenizer(text.read_text()[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    hessians: dict[str, Tensor] = {}
    handles = []
    weights: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and any(f".layers.{b}." in name for b in blocks):
            weights[name] = module.weight.detach()
            handles.append(module.register_forward_pre_hook(_collector(hessians, name)))
    with torch.no_grad():
        for chunk in ids.split(1024, dim=1):
            net.model(chunk)
    for handle in handles:
        handle.remove()
    records: list[dict[str, Any]] = []
    kinds = ("q_proj", "gate_proj", "down_proj")
    for kind in kinds:
        names = [name for name in weights if name.endswith(kind)]
        layers = [(weights[name], hessians[name]) for name in names]
        records += losses(f"{model.name} {kind}, blocks {blocks}", layers)
    return records


def _collector(hessians: dict[str, Tensor], name: str) -> Callable[[Any, Any], None]:
    def hook(module: Any, args: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        hessians[name] = hessians.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["speed", "loss", "real"])
    parser.add_argument("--model", type=Path, help="folder of a Llama-like model")
    parser.add_argument("--text", type=Path, help="calibration text")
    parser.add_argument("--blocks", default="3,27")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Sections that are not run keep the records of the last run.
    path = RESULTS / "bench_rounding.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    sections: dict[str, list[dict[str, Any]]] = {"speed": [], "loss": [], "real": []}
    for record in kept:
        sections[record["section"]].append(record)
    if options.only in (None, "speed"):
        shapes = ((1024, 2048, 128), (2048, 4096, 64))
        sections["speed"] = [speed(*shape, options.rounds) for shape in shapes]
    if options.only in (None, "loss"):
        layers = [make_layer(512, 1024, seed) for seed in (0, 1)]
        sections["loss"] = losses("generator, m=512, d=1024", layers)
    if options.only in (None, "real") and options.model and options.text:
        blocks = [int(b) for b in options.blocks.split(",")]
        sections["real"] = real_layers(options.model, options.text, blocks, options.tokens)
    records = [{**r, "section": name} for name, found in sections.items() for r in found]
    print(write_results("bench_rounding", records))


if __name__ == "__main__":
    main()
