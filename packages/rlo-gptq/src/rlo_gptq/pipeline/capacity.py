r"""Memory, bytes and time of a quantization from a config.json alone, for a named device.

Times come from operation counts and two stated ceilings of the device: a step takes the longer of
flops / ceiling and bytes / ceiling, and nothing else: a lower bound. Memory is that of a process,
as `quantize --dry-run` has it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rlo_core.errors import RLOError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlo_gptq.models.layout import find_layout, split_all_experts
from rlo_gptq.models.outside import find_outside
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.plan import sequence_length
from rlo_gptq.rounding.methods import rounding_bytes
from rlo_gptq.settings import LayerSettings, trellis_state_bits

PASSES = 3.5
"""Forward passes of a block's layers: in true-sequential order 2.5, one more for its output."""


class CapacityError(RLOError):
    """A config from which no plan can be made."""


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Args:
        half: Flops a second of matrix products in half precision.
        single: In float32.
        bandwidth: Bytes a second of its memory.
        memory: Bytes; None is not checked.
    """

    half: float
    single: float
    bandwidth: float
    memory: float | None


DEVICES = {
    "h100": Ceilings(700e12, 50e12, 3.0e12, 80e9),
    "h200": Ceilings(700e12, 50e12, 4.3e12, 141e9),
    "a100": Ceilings(250e12, 18e12, 1.7e12, 80e9),
    "l40s": Ceilings(250e12, 60e12, 0.75e12, 48e9),
    "rtx4090": Ceilings(150e12, 60e12, 0.9e12, 24e9),
    "cpu": Ceilings(25e9, 25e9, 10e9, None),
}
"""About four fifths of what is printed on them; "cpu" is one core."""


@dataclass(frozen=True)
class Cost:
    """Flops and bytes of one step."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the longer of both."""
        return max(self.flops / flops, self.bytes / bandwidth)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


FITTING_PRODUCTS, FITTING_MOVES = 6.0, 690.0
"""Products of (m, d) with (d, d), and times the weight is read or written in float32, beside the
passes: fits and refits of the grid, and the factor. As traced at 4096 x 4096 on a fake device,
where `tests/gpu/test_rounding_trace.py` compares them."""


def rounding_cost(m: int, d: int, settings: LayerSettings) -> Cost:
    """Return what rounding a weight (m, d) costs: fits, feedback, greedy passes, refits.

    Each block of columns passes its errors on in the feedback, and its moves in a greedy pass.
    """
    blocks = -(-d // settings.block_size)
    feedback = 1.0 if settings.method != "nearest" else 0.0
    passes = float(settings.passes)
    flops = 2.0 * m * d * d * (FITTING_PRODUCTS + passes)
    moved = 4.0 * m * d * (FITTING_MOVES + blocks * (feedback + 1.75 * passes))
    state_bits = trellis_state_bits(settings.grid)
    if state_bits is not None:  # all states, of several predecessors, for each weight and pass
        flops += 2.0**state_bits * 6.0 * m * d * (1.0 + passes)
    return Cost(flops, moved)


def skeleton_of(path: str | Path) -> tuple[Any, Any]:
    """Return the config and the model on no device of a folder, a config.json or a hub name.

    Raises:
        CapacityError: there is no readable config of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(str(path))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CapacityError(f"{str(path)!r} has no config to plan from: {reason}") from error
    return config, model


def _stages(layers: dict[str, nn.Linear], width: int) -> dict[str, list[str]]:
    """Layers of a block that are rounded at the same time: those of one module, the last apart."""
    parents: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        parent = name.rsplit(".", 1)[0] if "." in name else ""
        parents[parent.rsplit(".experts.", 1)[0] if ".experts." in name else parent].append(name)
    stages: dict[str, list[str]] = {}
    for parent, names in parents.items():
        out = [n for n in names if layers[n].out_features == width and n != names[0]]
        out = [n for n in out if n.rsplit(".", 1)[-1] not in ("k_proj", "v_proj", "up_proj")]
        stages[f"{parent} in"] = [n for n in names if n not in out]
        stages[f"{parent} out"] = out
    return {key: names for key, names in stages.items() if names}


def _packed_bytes(m: int, d: int, settings: LayerSettings) -> int:
    layer = QuantLinear(d, m, settings, device="meta")
    return sum(t.numel() * t.element_size() for t in layer.state_dict().values())


def plan_capacity(
    path: str | Path,
    settings: LayerSettings,
    *,
    device: str = "h100",
    ceilings: Ceilings | None = None,
    processes: int = 1,
    nsamples: int = 128,
    seqlen: int | None = None,
    dtype: str = "bfloat16",
    outside_bits: int = 8,
) -> dict[str, Any]:
    """Return a document of sizes, memory, counts and times.

    Args:
        path: A folder, a config.json or a hub name; no weights are read.
        settings: Of the layers.
        device: A name of `DEVICES`, for the ceilings.
        ceilings: Instead of the device's.
        processes: Of `torchrun`, one device each.
        nsamples: Calibration sequences, shared by the processes.
        seqlen: Tokens in each; None is the model's length, at most 2048.
        dtype: In which blocks are run.
        outside_bits: Of embedding and head.

    Raises:
        CapacityError: there is no readable config.
        UnsupportedModelError: the model has no blocks of linear layers.
        CalibrationError: the sequences are longer than the model's.
    """
    top = ceilings or DEVICES[device]
    config, model = skeleton_of(path)
    split_all_experts(model)
    layout = find_layout(model)
    text = config.get_text_config(decoder=True)
    length, width = sequence_length(config, seqlen), text.hidden_size
    item = getattr(torch, dtype).itemsize
    tokens = nsamples * length
    own = -(-nsamples // processes)
    blocks = list(model.get_submodule(layout.blocks).children())
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0

    forward, hessians, rounding = Cost(0, 0), Cost(0, 0), Cost(0, 0)
    slowest = calibrating = rounded = 0.0
    quantized = packed = 0
    seen: dict[tuple[tuple[int, int], ...], tuple[Any, ...]] = {}
    for index, block in enumerate(blocks):
        layers = {
            name: layer
            for name in layout.linears[index]
            if isinstance(layer := block.get_submodule(name), nn.Linear)
        }
        key = tuple((layer.out_features, layer.in_features) for layer in layers.values())
        if key not in seen:
            seen[key] = _block_costs(layers, settings, top, tokens, share, processes, item, width)
        costs, seconds, weights, size = seen[key]
        forward, hessians = forward + costs[0], hessians + costs[1]
        rounding, slowest = rounding + costs[2], slowest + seconds
        quantized, packed = quantized + weights, packed + size
        largest = max(d for _, d in key)
        calibrating = max(calibrating, 8.0 * largest**2 + length * (4 * width + 3 * largest) * item)
        rounded = max(rounded, *(rounding_bytes(m, d, settings, cuda=True) for m, d in key))
    total = sum(p.numel() for p in model.parameters())
    beside = total - sum(p.numel() for block in blocks for p in block.parameters())
    block_bytes = max(sum(p.numel() for p in block.parameters()) for block in blocks) * item
    activations = own * length * width * item
    peak = activations + max(beside * item, block_bytes + max(calibrating, rounded))
    half = top.half if dtype != "float32" else top.single
    times = {
        "forward": forward.seconds(half, top.bandwidth) / processes,
        "hessians": hessians.seconds(top.single, top.bandwidth) / processes,
        "rounding": slowest,
    }
    kept = total - quantized - beside
    outside = beside * outside_bits // 8
    return {
        "model_type": config.model_type,
        "blocks": layout.count,
        "layers": len(layout.names()),
        "parameters": total,
        "quantized_parameters": quantized,
        "tied": find_outside(model)[2],
        "bits_per_weight": round(8 * packed / quantized, 3),
        "checkpoint_bytes": packed + outside + 2 * kept,
        "weight_bytes_read": total * 2,
        "device": device,
        "processes": processes,
        "ceilings": asdict(top),
        "sequences_per_process": own,
        "block_bytes": block_bytes,
        "activation_bytes": activations,
        "peak_memory_bytes": int(peak),
        "fits": None if top.memory is None else bool(peak <= 0.9 * top.memory),
        "forward_tflop": round(forward.flops / 1e12, 1),
        "hessian_tflop": round(hessians.flops / 1e12, 1),
        "rounding_tflop": round(rounding.flops / 1e12, 1),
        "rounding_bytes": int(rounding.bytes),
        **{f"{name}_seconds": round(value, 1) for name, value in times.items()},
        "seconds": round(sum(times.values()), 1),
        "settings": settings.to_dict(),
    }


def _block_costs(
    layers: dict[str, nn.Linear],
    settings: LayerSettings,
    top: Ceilings,
    tokens: int,
    share: float,
    processes: int,
    item: int,
    width: int,
) -> tuple[tuple[Cost, Cost, Cost], float, int, int]:
    """Costs of a block, the seconds of its rounding over the processes, its weights and bytes."""
    forward, hessians, rounding = Cost(0, 0), Cost(0, 0), Cost(0, 0)
    seconds, weights, packed = 0.0, 0, 0
    each: dict[str, float] = {}
    for name, layer in layers.items():
        m, d = layer.out_features, layer.in_features
        there = tokens * (share if ".experts." in name else 1.0)
        forward += Cost(PASSES * 2 * there * m * d, PASSES * item * (m * d + there * (m + d)))
        hessians += Cost(2 * there * d * d, 4.0 * d * d * 2 + item * there * d)
        cost = rounding_cost(m, d, settings)
        rounding += cost
        each[name] = cost.seconds(top.single, top.bandwidth)
        weights, packed = weights + m * d, packed + _packed_bytes(m, d, settings)
    for names in _stages(layers, width).values():
        loads = [sum(each[n] for n in names[rank::processes]) for rank in range(processes)]
        seconds += max(loads)
    return (forward, hessians, rounding), seconds, weights, packed
