"""The size of a checkpoint before it is made, to the byte: its tensors are known, on no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlo_gptq.models import shards
from rlo_gptq.models.fold_checkpoint import FoldedHead
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.outside import Outside
from rlo_gptq.models.shards import file_bytes, tensor_bytes
from rlo_gptq.models.source import ModelSource
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.block import block_tensors, empty_like
from rlo_gptq.pipeline.outside import EMBEDDING, empty_matrix, fold_tensors, part_names, rest_names
from rlo_gptq.settings import LayerSettings


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint.

    Args:
        files: Of all weight files, headers and all.
        layers: Of the packed layers in the blocks.
        embedding: Of the token embedding, packed or not.
        head: Of a head of its own; 0 for one that is tied.
        other: Of what is left: norms, biases, layers that are not quantized.
    """

    files: int
    layers: int
    embedding: int
    head: int
    other: int


def checkpoint_sizes(
    source: ModelSource,
    skeleton: nn.Module,
    layout: Layout,
    outside: Outside,
    settings: LayerSettings,
) -> Sizes:
    """Return the sizes of the checkpoint that these decisions make.

    Args:
        source: The model.
        skeleton: Its skeleton with experts split, on the meta device.
        layout: Its blocks.
        outside: How embedding and head are stored.
        settings: Of the layers.
    """
    parts = planned_parts(source, skeleton, layout, outside, settings)
    total = sum(tensor_bytes(tensors) for tensors in parts.values())
    if total <= shards.SINGLE_FILE_BYTES:
        files = file_bytes({name: t for tensors in parts.values() for name, t in tensors.items()})
    else:
        files = sum(file_bytes(tensors) for tensors in parts.values())
    found = {"layers": 0, "embedding": 0, "head": 0, "other": 0}
    packed = set(layout.names())
    for tensors in parts.values():
        for name, tensor in tensors.items():
            owner = name.rpartition(".")[0]
            if owner == outside.embedding:
                kind = "embedding"
            elif owner == outside.head:
                kind = "head"
            else:
                kind = "layers" if owner in packed else "other"
            found[kind] += tensor.numel() * tensor.element_size()
    return Sizes(files, **found)


def planned_parts(
    source: ModelSource,
    skeleton: nn.Module,
    layout: Layout,
    outside: Outside,
    settings: LayerSettings,
) -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of each part of the work folder, most of them on the meta device."""
    parts: dict[str, Mapping[str, Tensor]] = {}
    state = skeleton.state_dict()
    for part in part_names(layout, outside):
        if part == "rest":
            names = rest_names(source, layout, outside)
            dense = {n: outside.as_stored(n, source.as_stored(n, state[n])) for n in names}
            own_head = f"{outside.head}.weight"
            dense_head = not outside.tied and outside.head not in outside.quantized
            if dense_head and own_head in state and own_head not in dense:  # folding will make it
                like = f"{outside.embedding}.weight"
                dense[own_head] = outside.as_stored(own_head, source.as_stored(like, state[like]))
            folded = FoldedHead(str(outside.fold), 0, torch.ones(_width(skeleton, outside)))
            parts[part] = {**dense, **fold_tensors(outside, folded)}
        elif part.startswith("block-"):
            index = int(part.removeprefix("block-"))
            name = layout.block_name(index)
            block = skeleton.get_submodule(name)
            packed: dict[str, QuantLinear] = {}
            for layer in layout.linears[index]:
                linear = block.get_submodule(layer)
                assert isinstance(linear, nn.Linear)
                packed[layer] = empty_like(linear, layout.settings(f"{name}.{layer}", settings))
            parts[part] = block_tensors(source, block, name, packed)
        else:
            owner = outside.embedding if part == EMBEDDING else outside.last
            assert owner is not None
            matrix = empty_matrix(owner, outside, skeleton, outside.quantized[owner])
            parts[part] = {f"{owner}.{k}": v for k, v in matrix.state_dict().items()}
    return parts


def _width(skeleton: nn.Module, outside: Outside) -> int:
    shape: torch.Size = skeleton.get_parameter(f"{outside.embedding}.weight").shape
    return shape[1]
