"""What a quantization would do, and about what it would take, before it does it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.lm.tokens import LONGEST_WINDOW
from torch import nn

from rlo_gptq.bit_rules import BitRuleError, apply_rules
from rlo_gptq.calibration.hessian_sum import CalibrationError
from rlo_gptq.models.layout import Layout, find_layout, split_all_experts
from rlo_gptq.models.outside import Outside, plan_outside
from rlo_gptq.pipeline.sizes import checkpoint_sizes
from rlo_gptq.rounding.methods import rounding_bytes

if TYPE_CHECKING:
    from rlo_gptq.models.source import ModelSource
    from rlo_gptq.options import Options

_FLOPS = {"cpu": 25e9, "cuda": 2e13}
"""Sustained float32 operations per second that times are guessed with: one core, one data-centre
GPU."""


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Args:
        layout: Blocks and layers.
        seqlen: Tokens of a calibration sequence.
        outside: How embedding and head are stored.
        shapes: Of each layer to quantize, (out, in), by its full name.
        summary: Numbers to show: parameters, bytes, memory, time.
    """

    layout: Layout
    seqlen: int
    outside: Outside
    shapes: dict[str, tuple[int, int]]
    summary: dict[str, Any]


def sequence_length(config: Any, wanted: int | None) -> int:
    """Return the tokens of a sequence: what is wanted, or the model's length, at most 2048.

    Raises:
        CalibrationError: the sequences are longer than the model's.
    """
    text = config.get_text_config(decoder=True)
    longest: int = getattr(text, "max_position_embeddings", None) or (1 << 30)
    length = wanted or min(longest, LONGEST_WINDOW)
    if length > longest:
        raise CalibrationError(f"seqlen must be at most the model's {longest}, got {length}")
    return length


def discover(source: ModelSource, options: Options, *, folded: str | None = None) -> Plan:
    """Find the layers and estimate memory and time; loads no weights.

    The size of the checkpoint is exact. The time is a guess from operation counts, good to a factor
    of a few.

    Args:
        source: The model; with `--rotate fold` the folded one, or before that is made the original.
        options: What to do.
        folded: Kind of the rotation of a folded model whose head was tied.

    Raises:
        UnsupportedModelError: there are no layers to quantize.
        BitRuleError: no layer follows a rule for bits.
        OutsideError: embedding or head cannot have the bits that were asked for.
        CalibrationError: the sequences are longer than the model's.
    """
    skeleton = copy.deepcopy(source.model)  # splitting experts would hide them from the loader
    split_all_experts(skeleton)
    layout = find_layout(skeleton, skip=options.skip)
    if options.bits:
        if options.gguf is not None:
            raise BitRuleError("--bits takes no --format gguf: its --type decides every layer's")
        chosen = apply_rules(layout.names(), options.bits, options.layer.bits)
        layout = replace(layout, bits=chosen)
    outside = plan_outside(source.model, options, source.came_as, folded=folded)
    text = source.config.get_text_config(decoder=True)
    seqlen = sequence_length(source.config, options.seqlen)
    dtype: torch.dtype = getattr(torch, options.dtype)
    item = dtype.itemsize
    blocks = list(skeleton.get_submodule(layout.blocks).children())
    block_bytes = max(sum(p.numel() for p in block.parameters()) * item for block in blocks)
    named = {
        name: (linear.out_features, linear.in_features)
        for name in layout.names()
        if isinstance(linear := skeleton.get_submodule(name), nn.Linear)
    }
    shapes = list(named.values())
    quantized = sum(m * d for m, d in shapes)
    tied = set(source.model.all_tied_weights_keys)
    total = sum(p.numel() for name, p in _parameters(skeleton).items() if name not in tied)
    sizes = checkpoint_sizes(source, skeleton, layout, outside, options.layer)
    width = text.hidden_size
    activations = options.nsamples * seqlen * width * item
    largest = max(d for _, d in shapes)
    beside = total - sum(p.numel() for block in blocks for p in block.parameters())
    # What is outside of the blocks is in memory by itself, once as it is run and once as stored.
    stored_as = source.stored_dtype
    saving = beside * (item + (0 if stored_as == dtype else stored_as.itemsize))
    # Two sums of (d, d) while calibrating, and what a block makes of one sequence.
    calibrating = 8 * largest * largest + seqlen * (4 * width + 3 * largest) * item
    on_gpu = source.device.type == "cuda"
    rounded = max(
        rounding_bytes(m, d, layout.settings(name, options.layer), cuda=on_gpu)
        for name, (m, d) in named.items()
    )
    tokens = options.nsamples * seqlen
    # Forward: about 2.5 passes of a block in true-sequential order, one more for its output.
    forward = 2 * tokens * quantized * 3.5
    hessians = 2 * tokens * sum(d * d for _, d in shapes)
    rounding = sum((d**3) / 1 + 2 * m * d * d * (2 + options.layer.passes) for m, d in shapes)
    kind = source.device.type
    speed = _FLOPS.get(kind, _FLOPS["cpu"]) * (torch.get_num_threads() if kind == "cpu" else 1)
    kept = activations * (not options.offload)
    peak = max(saving, kept + max(beside * item, block_bytes + max(calibrating, rounded)))
    if options.tune is not None:
        # Held: the dense outputs; codes as floats, dense weights and their gradients, in float32.
        tuned = 4 * max(sum(p.numel() for p in block.parameters()) for block in blocks)
        peak = max(peak, block_bytes + 4 * tuned + kept) + kept
        forward += 2 * tokens * quantized * (2 + 4 * options.tune.epochs)
    return Plan(
        layout,
        seqlen,
        outside,
        named,
        {
            "model_type": source.config.model_type,
            "blocks": layout.count,
            "layers": len(shapes),
            "parameters": total,
            "quantized_parameters": quantized,
            "bits_per_weight": round(8 * sizes.layers / quantized, 3),
            "bits": _widths(layout, named, options.layer.bits),
            "embedding": outside.reasons[0],
            "head": outside.reasons[1],
            "checkpoint_bytes": sizes.files,
            "layer_bytes": sizes.layers,
            "embedding_bytes": sizes.embedding,
            "head_bytes": sizes.head,
            "other_bytes": sizes.other,
            "block_bytes": block_bytes,
            "activation_bytes": activations,
            "largest_hessian_bytes": 4 * largest * largest,
            "rounding_bytes": rounded,
            "peak_memory_bytes": peak,
            "available_memory_bytes": _available(source.device),
            "estimated_seconds": round((forward + hessians + rounding) / speed, 1),
            "calibration_tokens": tokens,
            "device": str(source.device),
        },
    )


def _widths(layout: Layout, shapes: dict[str, tuple[int, int]], default: int) -> str:
    """Say how many weights have which bits, e.g. "2: 70 %, 4: 30 %"."""
    total: dict[int, int] = {}
    for name, (m, d) in shapes.items():
        bits = layout.bits.get(name, default)
        total[bits] = total.get(bits, 0) + m * d
    every = sum(total.values())
    return ", ".join(f"{bits}: {100 * n / every:.3g} %" for bits, n in sorted(total.items()))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:  # free pages alone would leave out the cache of files, which gives way
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
