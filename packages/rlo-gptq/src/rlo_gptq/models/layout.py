"""Finding the decoder blocks of a causal language model and the linear layers in them, by
structure.

No architecture is named here: a model is supported if it has one list of like blocks whose weights
are in `nn.Linear` (OPT, Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ...) or in fused experts of the
usual layout (Mixtral, Qwen MoE, ...); anything else is refused with what was found.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlo_core.errors import RLOError
from torch import nn

from rlo_gptq.models.experts import SplitExperts, is_fused_experts, split_experts
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Layers that choose experts: tiny, and a wrong choice costs far more than the bits."""


class UnsupportedModelError(RLOError):
    """A model without decoder blocks of linear layers."""


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a model are, and what of them is quantized.

    Args:
        blocks: Path of the list of decoder blocks, e.g. "model.layers".
        count: How many blocks.
        linears: For each block the names, inside the block, of the layers to quantize, in the
            module's order.
        experts: Whether fused experts have to be split into such layers; not if all are skipped.
        bits: Bits of those layers, by their full names, that do not have the settings' own.
    """

    blocks: str
    count: int
    linears: tuple[tuple[str, ...], ...]
    experts: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)

    def settings(self, name: str, default: LayerSettings) -> LayerSettings:
        """Return the settings of the layer of this full name."""
        return default.with_bits(self.bits.get(name, default.bits))

    def bits_in_blocks(self) -> dict[str, int]:
        """Return `bits` by names that begin with the block's number, e.g. "0.mlp.down_proj"."""
        return {name.removeprefix(f"{self.blocks}."): bits for name, bits in self.bits.items()}

    def block_name(self, index: int) -> str:
        """Return the full name of a block, e.g. "model.layers.3"."""
        return f"{self.blocks}.{index}"

    def names(self) -> list[str]:
        """Return the full names of all layers to quantize."""
        return [
            f"{self.block_name(index)}.{name}"
            for index, names in enumerate(self.linears)
            for name in names
        ]


def split_all_experts(model: nn.Module, *, within: Sequence[str] | None = None) -> list[str]:
    """Replace fused experts (3-D weights) by lists of linear layers; return the names of those
    replaced.

    Args:
        model: Changed in place; weights on the meta device stay there.
        within: Only experts of these names; all of them by default.

    Raises:
        UnsupportedModelError: experts of a layout that is not known.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        if any(p.ndim == 3 for p in module.parameters(recurse=False)) and (
            within is None or name in within
        ):
            if not is_fused_experts(module):
                shapes = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
                raise UnsupportedModelError(
                    f"experts of class {type(module).__name__} at {name!r} must hold gate_up_proj "
                    f"(experts, 2 * inner, width) and down_proj, got {shapes}"
                )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, split_experts(module))
            replaced.append(name)
    return replaced


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists whose every element holds linear layers."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and all(len(_linears(block)) > 1 for block in module)
        ):
            found[name] = module
    return found


def _found(model: nn.Module) -> str:
    """Say what weights a model has, for a refusal."""
    kinds = Counter(
        type(module).__name__ for module in model.modules() if list(module.parameters(False))
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)) or "no weights"


def find_layout(model: PreTrainedModel, *, skip: Sequence[str] = ()) -> Layout:
    """Return the decoder blocks of `model` and their layers to quantize.

    Args:
        model: A causal language model, on any device, experts already split.
        skip: Patterns with `*` of full names that stay as they are, e.g. "*.down_proj".

    Raises:
        UnsupportedModelError: no such blocks, an encoder-decoder model, a pattern that no layer
            has, or nothing left to quantize.
    """
    kind = f"{type(model).__name__} (model type {model.config.model_type!r})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model must be a decoder, got {kind}, an encoder-decoder with {_found(model)}"
        )
    lists = _block_lists(model)
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    inside = {id(module) for module in decoder.modules()}
    lists = {name: blocks for name, blocks in lists.items() if id(blocks) in inside}
    if not lists:
        raise UnsupportedModelError(
            f"model must have a list of decoder blocks made of nn.Linear, got {kind} "
            f"with {_found(model)}"
        )
    path, blocks = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    every = [
        [name for name in _linears(block) if name.rpartition(".")[2] not in _ROUTERS]
        for block in blocks
    ]
    whole = Layout(path, len(blocks), tuple(map(tuple, every)))
    for pattern in skip:
        if not fnmatch.filter(whole.names(), pattern):
            inside_block = sorted({name for names in every for name in names})
            raise UnsupportedModelError(
                f"no layer of {kind} is named {pattern!r}, as --skip says; its blocks at {path!r} "
                f"have {', '.join(inside_block[:12])}"
            )
    linears = tuple(
        tuple(
            name
            for name in names
            if not any(fnmatch.fnmatchcase(f"{path}.{index}.{name}", p) for p in skip)
        )
        for index, names in enumerate(every)
    )
    if not any(linears):
        raise UnsupportedModelError(f"nothing is left to quantize in {kind} after --skip")
    layout = Layout(path, len(blocks), linears)
    split = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, SplitExperts))
    return replace(layout, experts=any(name.startswith(split) for name in layout.names()))
