"""What tuning takes, known before anything is loaded: from shapes alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlo_gptq.models.layout import Layout, split_all_experts
from rlo_gptq.models.source import ModelSource
from rlo_gptq.packed.packing import packed_words
from rlo_gptq.pipeline.plan import sequence_length
from rlo_gptq.rounding.grids import groups_of
from rlo_gptq.settings import EndToEndSettings, LayerSettings
from rlo_gptq.tuning.divergence import ROWS

_TRAINED_BYTES = 20
"""Of a trained number: its value as stored, what Adam moves, the gradient, two moments; float32."""


@dataclass(frozen=True)
class Sizes:
    """What of a model decides the memory of tuning.

    Args:
        loaded: Bytes of the packed model in memory, what is not packed in float32.
        trained: Numbers that are trained.
        block: Weights of the largest block.
        outside: Weights outside of the blocks.
        blocks: How many blocks.
        width: Of hidden states.
        inner: Inputs or outputs of the widest layer.
        vocabulary: Tokens of the output layer.
    """

    loaded: int
    trained: int
    block: int
    outside: int
    blocks: int
    width: int
    inner: int
    vocabulary: int


def model_sizes(model: Any, layout: Layout, layer: LayerSettings, *, embeddings: bool) -> Sizes:
    """Return the sizes of a model that is packed with some settings.

    Args:
        model: A skeleton without weights, experts split where they are packed.
        layout: Of its blocks.
        layer: Of its packed layers.
        embeddings: Whether embeddings and output layer are trained.
    """
    packed = {name: model.get_submodule(name) for name in layout.names()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    codes = {id(linear.weight) for linear in packed.values()}
    loaded = trained = 0
    tied = set(model.all_tied_weights_keys)  # of a skeleton without weights, not one tensor
    for name, parameter in model.named_parameters():
        if id(parameter) not in codes and name not in tied:
            loaded += 4 * parameter.numel()
            if parameter.ndim == 1 or (embeddings and id(parameter) in tables):
                trained += parameter.numel()
    for linear in packed.values():
        m, d = linear.out_features, linear.in_features
        grid = m * groups_of(d, layer.group_size)
        zeros = grid if not layer.sym and not layer.integer_zero else 0
        own = grid + zeros + (d if layer.rescale else 0)
        trained += own
        loaded += 4 * (m * packed_words(d, layer.bits) + own)
    blocks = [
        sum(p.numel() for p in block.parameters())
        for block in model.get_submodule(layout.blocks).children()
    ]
    text = model.config.get_text_config(decoder=True)
    return Sizes(
        loaded=loaded,
        trained=trained,
        block=max(blocks),
        outside=sum(p.numel() for n, p in model.named_parameters() if n not in tied) - sum(blocks),
        blocks=len(blocks),
        width=text.hidden_size,
        inner=max(max(m.in_features, m.out_features) for m in packed.values()),
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
    rows = min(seqlen, ROWS)
    logits = 4 * rows * sizes.vocabulary
    trained = _TRAINED_BYTES * sizes.trained
    # Of one sequence in one block: inputs of norms and layers and their rotated forms, twelve times
    # the width; what gate and up give, its product, its rotated form: six times the widest.
    activations = 4 * seqlen * (12 * sizes.width + 6 * sizes.inner)
    states = (sizes.blocks + 2) * settings.batch * state
    student = sizes.loaded + trained + states + max(4 * sizes.block + activations, 4 * logits)
    kept = 0 if offload else settings.nsamples * state
    teacher = kept + max(4 * sizes.block + activations, 4 * sizes.outside + 4 * logits)
    return {
        "packed_bytes": sizes.loaded,
        "trained_numbers": sizes.trained,
        "trained_bytes": trained,
        "hidden_state_bytes": states,
        "block_bytes": 4 * sizes.block + activations,
        "logit_bytes": 4 * logits,
        "teacher_bytes": teacher,
        "peak_memory_bytes": max(student, teacher),
        "teacher_disk_bytes": settings.nsamples * seqlen * (8 * settings.top_k + 8),
    }


def plan_tuning(
    source: ModelSource,
    layout: Layout,
    layer: LayerSettings,
    settings: EndToEndSettings,
    *,
    offload: bool,
) -> dict[str, int]:
    """Return what tuning would do and take, in numbers to show; loads no weights.

    Args:
        source: The dense model.
        layout: Of its blocks and packed layers.
        layer: Of the packed layers.
        settings: Of the tuning.
        offload: Whether the dense model's hidden states are in a file.
    """
    seqlen = sequence_length(source.config, settings.seqlen)
    skeleton = copy.deepcopy(source.model)
    if layout.experts:
        split_all_experts(skeleton)
    sizes = model_sizes(skeleton, layout, layer, embeddings=settings.embeddings)
    return {
        "steps": settings.steps,
        "sequences": settings.nsamples,
        "seqlen": seqlen,
        "tokens_of_a_step": settings.batch * seqlen,
        **tuning_memory(sizes, settings, seqlen, offload=offload),
    }
