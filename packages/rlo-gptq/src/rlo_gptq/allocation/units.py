"""What gets bits of its own, which bits it may have, and how large the file is with a choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rlo_gptq.bit_rules import apply_rules
from rlo_gptq.models import shards
from rlo_gptq.models.layout import split_all_experts
from rlo_gptq.models.outside import NARROWEST, Outside, find_outside, plan_outside
from rlo_gptq.models.shards import file_bytes, tensor_bytes
from rlo_gptq.pipeline.outside import part_names
from rlo_gptq.pipeline.plan import Plan, discover
from rlo_gptq.pipeline.sizes import planned_parts
from rlo_gptq.settings import BITS

if TYPE_CHECKING:
    from rlo_gptq.models.source import ModelSource
    from rlo_gptq.options import Options

EMBEDDING, HEAD = "embedding", "head"
"""Names of the units that are no layers."""

Choice = Mapping[str, int]
"""The bits of each unit, by its name."""


@dataclass(frozen=True)
class Unit:
    """Layers that get the same bits: one, or the experts of one kind in one block.

    Args:
        name: The layer's full name; with `*` for an expert's number; "embedding" or "head".
        layers: Full names.
        weights: How many.
        bytes: Of the tensors, by the bits that can be chosen; 16 leaves an embedding as it is.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    bytes: Mapping[int, int]

    @property
    def kind(self) -> str:
        """The name inside a block, e.g. "mlp.down_proj"."""
        inside = [part for part in self.name.split(".") if not part.isdecimal()]
        return ".".join(inside[-2:])


class Units:
    """The units of a model, and the size of the file that a choice makes, to the byte.

    Args:
        source: The model, folded where rotations are folded.
        options: With rules and bits that are not left to choose.
        folded: Kind of the rotation of a folded model whose head was tied.
    """

    def __init__(self, source: ModelSource, options: Options, *, folded: str | None) -> None:
        self.source, self.options, self.folded = source, options, folded
        self.plan: Plan = discover(source, options, folded=folded)
        self.layout = self.plan.layout
        self.skeleton: nn.Module = copy.deepcopy(source.model)
        split_all_experts(self.skeleton)
        self._outside: dict[tuple[int | None, int | None], dict[str, Mapping[str, Tensor]]] = {}
        self._blocks = {bits: self._parts_of(bits) for bits in BITS}
        self.embedding, self.head, tied = find_outside(source.model)
        self.tied = tied or folded is not None
        self.units = (*self._of_layers(), *self._of_outside())

    def outside(self, choice: Choice) -> Outside:
        """Return how embedding and head are stored with a choice."""
        options = self.options_of(choice, only_outside=True)
        return plan_outside(self.source.model, options, self.source.came_as, folded=self.folded)

    def options_of(self, choice: Choice, *, only_outside: bool = False) -> Options:
        """Return the options of a run with the bits of a choice."""
        embed = choice.get(EMBEDDING, self.options.embed_bits)
        head = choice.get(HEAD, embed if self.tied else self.options.head_bits)
        if only_outside:
            return replace(self.options, embed_bits=embed, head_bits=head)
        usual = self.options.layer.bits
        rules = tuple(
            (layer, choice[unit.name])
            for unit in self.units
            if unit.layers and choice[unit.name] != usual
            for layer in unit.layers
        )
        return replace(self.options, embed_bits=embed, head_bits=head, bits=rules)

    def file_bytes(self, choice: Choice) -> int:
        """Return the size of the weight files, headers and all."""
        outside = self.outside(choice)
        beside = self._parts_outside(choice)
        bits = {layer: choice[u.name] for u in self.units for layer in u.layers}
        parts: list[Mapping[str, Tensor]] = []
        for part in part_names(self.layout, outside):
            if not part.startswith("block-"):
                parts.append(beside[part])
                continue
            parts.append(
                {
                    name: self._blocks[bits.get(_owner(name), BITS[0])][part][name]
                    for name in self._blocks[BITS[0]][part]
                }
            )
        if sum(tensor_bytes(part) for part in parts) > shards.SINGLE_FILE_BYTES:
            return sum(file_bytes(part) for part in parts)
        return file_bytes({name: tensor for part in parts for name, tensor in part.items()})

    def uniform(self, bits: int) -> dict[str, int]:
        """Return the choice of layers that all have these bits, the rest as is recommended."""
        options = replace(self.options, layer=self.options.layer.with_bits(bits))
        recommended = plan_outside(
            self.source.model, options, self.source.came_as, folded=self.folded
        )
        chosen = {}
        for unit in self.units:
            if unit.layers:
                wanted = bits
            else:
                name = self.embedding if unit.name == EMBEDDING else str(self.head)
                settings = recommended.quantized.get(name)
                wanted = max(unit.bytes) if settings is None else settings.bits
            chosen[unit.name] = min(unit.bytes, key=lambda b: abs(b - wanted))
        return chosen

    def _parts_of(self, bits: int) -> dict[str, Mapping[str, Tensor]]:
        layout = replace(self.layout, bits=dict.fromkeys(self.layout.names(), bits))
        return self._planned(layout, self.plan.outside)

    def _planned(self, layout: Any, outside: Outside) -> dict[str, Mapping[str, Tensor]]:
        return planned_parts(self.source, self.skeleton, layout, outside, self.options.layer)

    def _parts_outside(self, choice: Choice) -> dict[str, Mapping[str, Tensor]]:
        key = (choice.get(EMBEDDING), choice.get(HEAD))
        if key not in self._outside:
            layout = replace(self.layout, count=0, linears=(), bits={})
            self._outside[key] = self._planned(layout, self.outside(choice))
        return self._outside[key]

    def _of_layers(self) -> list[Unit]:
        names = self.layout.names()
        ruled = apply_rules(names, self.options.bits, 0)
        members: dict[tuple[str, int | None], list[str]] = {}
        for name in names:
            members.setdefault((self._unit_name(name), ruled.get(name)), []).append(name)
        sizes: dict[int, dict[str, int]] = {}
        for bits, parts in self._blocks.items():
            of_bits = sizes.setdefault(bits, {})
            for tensors in parts.values():
                for key, tensor in tensors.items():
                    owner = _owner(key)
                    size = tensor.numel() * tensor.element_size()
                    of_bits[owner] = of_bits.get(owner, 0) + size
        units = []
        for (unit, fixed), layers in members.items():
            units.append(
                Unit(
                    layers[0] if len(layers) == 1 else unit,
                    tuple(layers),
                    sum(m * d for m, d in (self.plan.shapes[name] for name in layers)),
                    {
                        bits: sum(sizes[bits][name] for name in layers)
                        for bits in (BITS if fixed is None else (fixed,))
                    },
                )
            )
        return units

    def _unit_name(self, name: str) -> str:
        prefix = f"{self.layout.blocks}."
        index, _, inside = name.removeprefix(prefix).partition(".")
        parts = ["*" if part.isdecimal() else part for part in inside.split(".")]
        return f"{prefix}{index}.{'.'.join(parts)}"

    def _of_outside(self) -> list[Unit]:
        units = []
        for name, owner, given in (
            (EMBEDDING, self.embedding, self._given()),
            (HEAD, self.head, self.options.head_bits),
        ):
            if owner is None or (name == HEAD and self.tied):
                continue
            now = self.plan.outside.quantized.get(owner)
            if given is None and now is None and self.options.layer.bits <= NARROWEST:
                continue  # it cannot be packed
            widths: tuple[int, ...] = (given,) if given is not None else self._widths()
            found = {}
            for bits in widths:
                parts = self._parts_outside({name: bits})
                found[bits] = sum(
                    tensor.numel() * tensor.element_size()
                    for tensors in parts.values()
                    for key, tensor in tensors.items()
                    if _owner(key) == owner
                )
            weight = self.source.model.get_parameter(f"{owner}.weight")
            units.append(Unit(name, (), weight.numel(), found))
        return units

    def _given(self) -> int | None:
        """Return the embedding's bits, where they are not left to choose."""
        if self.options.embed_bits is None and self.tied:
            return self.options.head_bits
        return self.options.embed_bits

    def _widths(self) -> tuple[int, ...]:
        """Return the bits an embedding may have: no more than it came with."""
        came = self.source.came_as.embedding_bits
        if came is not None and came <= BITS[-1]:
            return tuple(bits for bits in BITS if bits <= max(came, NARROWEST))
        return (*BITS, 16)


def sizes_of(units: Units, choice: Choice) -> dict[str, int]:
    """Return the tensor bytes of layers, embedding and head that a choice makes."""
    found = {"layers": 0, EMBEDDING: 0, HEAD: 0}
    for unit in units.units:
        found["layers" if unit.layers else unit.name] += unit.bytes[choice[unit.name]]
    return found


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
