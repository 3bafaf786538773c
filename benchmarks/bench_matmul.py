"""A packed linear layer on the CPU against the dense float32 product, one thread.

    python benchmarks/bench_matmul.py

512 rows of inputs are a prompt (bound by arithmetic), one row is a decoded token (bound by reading
weights: dense float32 reads 4 bytes a weight, packed b/8). `rotated` has an input rotation and a
rescaling too. `weight_bytes` is what a product reads of the weights and their scales.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch
from harness import compare, write_results
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.settings import LayerSettings
from torch import Tensor

KINDS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 8)},
    "4 bits, groups of 128": {"bits": 4, "group_size": 128},
    "2 bits, rotated": {"bits": 2, "incoherence": "hadamard", "rescale": True},
}


def random_layer(size: int, settings: LayerSettings) -> QuantLinear:
    """Every bit pattern is a code, so that random words are a layer."""
    layer = QuantLinear(size, size, settings)
    layer.weight = torch.randint(-(2**31), 2**31 - 1, layer.weight.shape, dtype=torch.int32)
    layer.scales = torch.rand(layer.scales.shape).to(layer.scales.dtype)
    return layer


def timing(device: str) -> dict[str, Any]:
    """The process's own time on a CPU, else the time until the device is done."""
    if device == "cpu":
        return {}
    return {"clock": time.perf_counter, "synchronize": torch.cuda.synchronize}


@torch.no_grad()
def measure(size: int, rows: int, rounds: int, device: str) -> list[dict[str, Any]]:
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    dense = torch.randn(size, size, device=device, dtype=dtype)
    x = torch.randn(rows, size, device=device, dtype=dtype)
    layers = {
        name: random_layer(size, LayerSettings(method="nearest", **kind)).to(device)
        for name, kind in KINDS.items()
    }
    baseline = f"dense {str(dtype).removeprefix('torch.')}"
    candidates: dict[str, Any] = {baseline: partial(torch.nn.functional.linear, x, dense)}
    candidates |= {name: partial(layer, x) for name, layer in layers.items()}
    times = compare(candidates, rounds=rounds, warmup=1, **timing(device))
    records = []
    for name, taken in times.items():
        tensors: list[Tensor] = [dense]
        if name in layers:
            tensors = [layers[name].weight, layers[name].scales]
        records.append(
            {
                "size": size,
                "device": torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu",
                "dtype": str(dtype),
                "rows": rows,
                "what": name,
                "seconds": taken["median"],
                "times_dense": taken["median"] / times[baseline]["median"],
                "weight_bytes": sum(t.numel() * t.element_size() for t in tensors),
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for float16 on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = []
    for size in (2048, 4096):
        for rows in (512, 1):
            records += measure(
                size, rows, options.rounds if rows > 1 else 3 * options.rounds, options.device
            )
    print(write_results("matmul" if options.device == "cpu" else "matmul_cuda", records))


if __name__ == "__main__":
    main()
