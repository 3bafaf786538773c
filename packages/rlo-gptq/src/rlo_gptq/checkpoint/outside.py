"""Embedding and head of a packed checkpoint: their entries in config.json, and their modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from rlo_gptq.checkpoint.validation import CheckpointError, require
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.settings import ALL_BITS, LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIELDS = {
    "embedding": {"kind", "settings", "columns", "scale"},
    "head": {"kind", "settings", "columns"},
    "tied": {"kind", "embedding", "fold"},
}
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class OutsideModule:
    """One entry of `outside` in the quantization configuration.

    Args:
        kind: "embedding", "head", or "tied" for a head that reads the embedding's matrix.
        settings: Of a packed matrix; None for a tied head.
        columns: Width of a packed matrix.
        scale: What an embedding's class multiplies rows by.
        embedding: Of a tied head, the module whose matrix it reads.
        fold: Of a tied head in a model with folded rotations, their kind.
    """

    kind: str
    settings: LayerSettings | None = None
    columns: int = 0
    scale: float = 1.0
    embedding: str = ""
    fold: str | None = None


def read_settings(values: Mapping[str, Any]) -> LayerSettings:
    """Return settings from a configuration's object.

    Raises:
        CheckpointError: a field is unknown or out of range.
    """
    require(isinstance(values, Mapping), f"settings must be an object, got {values!r}")
    try:
        return LayerSettings.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"quantization_config: {error}") from error


def with_settings(default: LayerSettings, bits: object, name: str) -> LayerSettings:
    """Return settings with other bits.

    Raises:
        CheckpointError: `bits` is none of those there are; says so of `name`.
    """
    good = type(bits) is int and bits in ALL_BITS
    require(good, f"{name} must be one of {', '.join(map(str, ALL_BITS))}, got {bits!r}")
    assert isinstance(bits, int)
    try:
        return default.with_bits(bits)
    except ValueError as error:
        raise CheckpointError(f"quantization_config: {error}") from error


def outside_modules(entries: Mapping[str, Any]) -> dict[str, OutsideModule]:
    """Return the entries of `outside`, checked.

    Raises:
        CheckpointError: an entry is malformed.
    """
    require(isinstance(entries, Mapping), f"outside must be an object, got {entries!r}")
    found = {}
    for name, entry in entries.items():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        require(
            isinstance(kind, str) and kind in _FIELDS and set(entry) == _FIELDS[kind],
            f"outside[{name!r}] must be an embedding, a head or a tied head with its fields",
        )
        if kind == "tied":
            embedding, fold = entry["embedding"], entry["fold"]
            good = isinstance(embedding, str) and fold in (None, "hadamard", "mean")
            require(good, f"outside[{name!r}] must name its embedding and a known rotation or null")
            found[name] = OutsideModule("tied", embedding=embedding, fold=fold)
            continue
        scale = entry.get("scale", 1.0)
        good = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        require(
            good and abs(scale) < 1e6, f"outside[{name!r}].scale must be a number, got {scale!r}"
        )
        columns = entry["columns"]
        good = type(columns) is int and 0 < columns < 1 << 24
        require(good, f"outside[{name!r}].columns must be a width, got {columns!r}")
        settings = read_settings(entry["settings"])
        found[name] = OutsideModule(str(kind), settings, columns, float(scale))
    return found


def submodule(model: nn.Module, name: str, kind: type[_Module]) -> _Module:
    """Return the module of a name.

    Raises:
        CheckpointError: it is not there, or of another kind.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"model has no layer {name!r}") from None
    require(
        isinstance(module, kind),
        f"layer {name!r} must be nn.{kind.__name__}, got {type(module).__name__}",
    )
    assert isinstance(module, kind)
    return module


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of a name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def swap_outside(
    model: PreTrainedModel, modules: Mapping[str, OutsideModule], dtype: torch.dtype
) -> list[str]:
    """Replace embedding and head by empty packed modules on the meta device.

    A body without its head keeps its own names, and leaves the head's entry out.

    Returns:
        The full names of the packed modules.

    Raises:
        CheckpointError: a named module is not there, or is of another kind.
    """
    prefix = f"{model.base_model_prefix}."
    body = not hasattr(model, model.base_model_prefix)
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {
        full: full.removeprefix(prefix) if body else full
        for full, entry in modules.items()
        if entry.kind == "embedding" or output is not None
    }
    replaced = []
    for full, name in sorted(names.items(), key=lambda item: modules[item[0]].kind):
        entry = modules[full]
        if entry.kind == "embedding":
            _swap_embedding(model, name, entry, dtype)
            replaced.append(name)
            continue
        head = submodule(model, name, nn.Linear)
        require(head is output, f"layer {name!r} must be the output head")
        bias = head.bias is not None
        new: nn.Module
        if entry.kind == "tied":
            embedding = submodule(model, entry.embedding, nn.Embedding)
            require(
                (embedding.num_embeddings, embedding.embedding_dim)
                == (head.out_features, head.in_features),
                f"layer {name!r} must have the size of its embedding {entry.embedding!r}",
            )
            new = TiedHead(embedding, fold=entry.fold, bias=bias, dtype=dtype, device="meta")
        else:
            assert entry.settings is not None
            _check_width(name, entry.columns, head.in_features)
            size = (head.in_features, head.out_features)
            new = QuantLinear(*size, entry.settings, bias=bias, dtype=dtype, device="meta")
            replaced.append(name)
        put(model, name, new)
        # transformers would tie the head's codes to the embedding's, or miss its weight.
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
    return replaced


def _swap_embedding(
    model: PreTrainedModel, name: str, entry: OutsideModule, dtype: torch.dtype
) -> None:
    embedding = submodule(model, name, nn.Embedding)
    require(
        embedding is model.get_input_embeddings(), f"layer {name!r} must be the token embedding"
    )
    assert entry.settings is not None
    _check_width(name, entry.columns, embedding.embedding_dim)
    try:
        packed = QuantEmbedding(
            embedding.num_embeddings,
            embedding.embedding_dim,
            entry.settings,
            scale=entry.scale,
            padding_idx=embedding.padding_idx,
            dtype=dtype,
            device="meta",
        )
    except ValueError as error:
        raise CheckpointError(f"layer {name!r}: {error}") from error
    put(model, name, packed)


def _check_width(name: str, columns: int, width: int) -> None:
    require(
        columns == width,
        f"outside[{name!r}].columns must be {width} in a model of this config.json, got {columns}",
    )


def dense_outside(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace packed embeddings and tied heads by ordinary modules with the same values."""
    modules = list(model.named_modules())
    heads = [(name, module) for name, module in modules if isinstance(module, TiedHead)]
    folded = {name: head.dequantize() for name, head in heads if head.fold is not None}
    for name, module in modules:
        if isinstance(module, QuantEmbedding):
            put(model, name, module.to_embedding(dtype))
    for name, old in heads:
        head = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        if name in folded:
            head.weight = nn.Parameter(folded.pop(name).to(dtype or torch.float32), False)
        else:
            head.weight = model.get_input_embeddings().weight  # type: ignore[operator]
        head.bias = old.bias
        put(model, name, head)
