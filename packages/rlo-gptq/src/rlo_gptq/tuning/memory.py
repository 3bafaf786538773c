"""What tuning takes, known before anything is loaded: measured on the model without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlo_gptq.checkpoint.hf_quantizer import RLOGPTQConfig, module_table, swap_linears
from rlo_gptq.checkpoint.outside import outside_modules, swap_outside
from rlo_gptq.models.layout import split_all_experts
from rlo_gptq.models.source import ModelSource
from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.tiles import TILE_ELEMENTS
from rlo_gptq.pipeline.plan import sequence_length
from rlo_gptq.settings import EndToEndSettings, LayerSettings
from rlo_gptq.tuning.divergence import logit_rows
from rlo_gptq.tuning.trained import trained_tensors

if TYPE_CHECKING:
    from rlo_gptq.pipeline.plan import Plan


@dataclass(frozen=True)
class Sizes:
    """What of a model decides the memory of tuning.

    Args:
        loaded: Bytes of the packed model in memory, what is not packed in float32.
        trained: Numbers that are trained.
        training: Bytes beside the model for them: as trained, the gradient, two moments.
        block: Weights of the largest block.
        outside: Weights outside of the blocks, of the dense model.
        blocks: How many blocks.
        width: Of hidden states.
        inner: Inputs or outputs of the widest layer.
        vocabulary: Tokens of the output layer.
    """

    loaded: int
    trained: int
    training: int
    block: int
    outside: int
    blocks: int
    width: int
    inner: int
    vocabulary: int


def packed_config(plan: Plan, layer: LayerSettings) -> RLOGPTQConfig:
    """Return the configuration of the checkpoint that a plan makes."""
    layout = plan.layout
    return RLOGPTQConfig(
        layer.to_dict(),
        layout.blocks,
        module_table(layout.linears),
        split_experts=layout.experts,
        outside=plan.outside.to_config(),
        bits=layout.bits_in_blocks(),
    )


def _unique_bytes(tensors: list[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def model_sizes(source: ModelSource, config: RLOGPTQConfig, *, embeddings: bool) -> Sizes:
    """Return the sizes of a model that is packed as a configuration says.

    Args:
        source: The dense model.
        config: Of the packed one.
        embeddings: Whether embeddings and output layer are trained.
    """
    copied: Any = copy.deepcopy(source.model)
    model: Any = copied.float()
    if config.split_experts:
        split_all_experts(model)
    tied = set(model.all_tied_weights_keys)
    blocks = [
        sum(p.numel() for p in block.parameters())
        for block in model.get_submodule(config.blocks).children()
    ]
    outside = sum(p.numel() for n, p in model.named_parameters() if n not in tied) - sum(blocks)
    swap_linears(model, config, torch.float32)
    swap_outside(model, outside_modules(config.outside), torch.float32)
    tied = set(model.all_tied_weights_keys)
    held = [p for name, p in model.named_parameters() if name not in tied]
    loaded = _unique_bytes([*held, *model.buffers()])
    widths = [
        max(module.rows, module.columns)
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight) and name.startswith(f"{config.blocks}.")
    ]
    before = {id(parameter) for parameter in model.parameters()}
    found = trained_tensors(model, None, embeddings=embeddings)
    # Grids are trained in a copy of their own, norms and embeddings where they are.
    copies = [p for p in model.parameters() if id(p) not in before]
    text = model.config.get_text_config(decoder=True)
    return Sizes(
        loaded=loaded,
        trained=sum(part.numbers for part in found),
        training=_unique_bytes(copies) + sum(part.training_bytes for part in found),
        block=max(blocks),
        outside=outside,
        blocks=len(blocks),
        width=text.hidden_size,
        inner=max(widths),
        vocabulary=text.vocab_size,
    )


def tuning_memory(
    sizes: Sizes, settings: EndToEndSettings, seqlen: int, *, offload: bool
) -> dict[str, int]:
    """Return the bytes that tuning takes, by what takes them.

    Args:
        sizes: Of the model.
        settings: Of the tuning.
        seqlen: Tokens of a sequence.
        offload: Whether the dense model's hidden states are in a file.
    """
    state = 4 * seqlen * sizes.width
    # Of some tokens: logits, their softmax, the gradient; and a tile of the head's rows.
    logits = 4 * (4 * min(seqlen, logit_rows(sizes.vocabulary)) * sizes.vocabulary + TILE_ELEMENTS)
    # Of one sequence in one block: inputs of norms and layers and their rotated forms, twelve times
    # the width; what gate and up give, its product, its rotated form: six times the widest.
    activations = 4 * seqlen * (12 * sizes.width + 6 * sizes.inner)
    states = (sizes.blocks + 2) * settings.batch * state
    student = sizes.loaded + sizes.training + states + max(4 * sizes.block + activations, logits)
    kept = 0 if offload else settings.nsamples * state
    teacher = kept + max(4 * sizes.block + activations, 4 * sizes.outside + logits)
    return {
        "packed_bytes": sizes.loaded,
        "trained_numbers": sizes.trained,
        "trained_bytes": sizes.training,
        "hidden_state_bytes": states,
        "block_bytes": 4 * sizes.block + activations,
        "logit_bytes": logits,
        "teacher_bytes": teacher,
        "peak_memory_bytes": max(student, teacher),
        "teacher_disk_bytes": settings.nsamples * seqlen * (8 * settings.top_k + 8),
    }


def plan_tuning(
    source: ModelSource, config: RLOGPTQConfig, settings: EndToEndSettings, *, offload: bool
) -> dict[str, int]:
    """Return what tuning would do and take, in numbers to show; loads no weights.

    Args:
        source: The dense model.
        config: Of the packed one.
        settings: Of the tuning.
        offload: Whether the dense model's hidden states are in a file.
    """
    seqlen = sequence_length(source.config, settings.seqlen)
    sizes = model_sizes(source, config, embeddings=settings.embeddings)
    return {
        "steps": settings.steps,
        "sequences": settings.nsamples,
        "seqlen": seqlen,
        "tokens_of_a_step": settings.batch * seqlen,
        **tuning_memory(sizes, settings, seqlen, offload=offload),
    }
