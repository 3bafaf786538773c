"""What is outside of the decoder blocks and may be quantized: the token embedding and the head.

Both are matrices of one row for each token of the vocabulary, in small models a fifth of all
weights. One matrix for both stays one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError
from torch import Tensor, nn

from rlo_gptq.settings import BITS, LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlo_gptq.models.stored_types import StoredTypes
    from rlo_gptq.options import Options

GROUP = 64
"""Columns of an embedding that share a scale where nothing is rotated: some columns are far larger
than the others, and a scale for the whole row would follow them."""
NARROWEST = 4
"""Bits that are chosen for an embedding that came with fewer: those cost more than they save."""


class OutsideError(RLOError):
    """Bits of an embedding or head that this model cannot have."""


@dataclass(frozen=True)
class Outside:
    """How embedding and head are stored.

    Args:
        embedding: Full name of the token embedding.
        head: Full name of the output head; None for a model without one.
        embedding_settings: How the embedding is rounded; None leaves it as it is.
        head_settings: How a head of its own is rounded; None leaves it as it is.
        tied: Whether the head reads the embedding's matrix.
        fold: For a tied head in a model whose rotations are folded, the kind of rotation.
        columns: Width of the embedding, and of the head.
        scale: What the model's class multiplies embeddings by.
        dtypes: Types of matrices that are stored narrower than they came, by the module's name.
        reasons: Why, for people: a line for the embedding and one for the head.
    """

    embedding: str
    head: str | None
    embedding_settings: LayerSettings | None = None
    head_settings: LayerSettings | None = None
    tied: bool = False
    fold: str | None = None
    columns: tuple[int, int] = (0, 0)
    scale: float = 1.0
    dtypes: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, str] = ("", "")

    @property
    def quantized(self) -> dict[str, LayerSettings]:
        """The matrices that are rounded, by the name of their module."""
        found = {}
        if self.embedding_settings is not None:
            found[self.embedding] = self.embedding_settings
        if self.head_settings is not None and self.head is not None and not self.tied:
            found[self.head] = self.head_settings
        return found

    @property
    def last(self) -> str | None:
        """The matrix that is rounded against the last hidden states: the head's, or the shared."""
        if self.tied:
            return self.embedding if self.embedding_settings is not None else None
        return self.head if self.head_settings is not None else None

    def to_config(self) -> dict[str, Any]:
        """Return the entry `outside` of `quantization_config`: modules that are replaced."""
        found: dict[str, Any] = {}
        if self.embedding_settings is not None:
            found[self.embedding] = {
                "kind": "embedding",
                "settings": self.embedding_settings.to_dict(),
                "columns": self.columns[0],
                "scale": self.scale,
            }
        if self.tied and self.head is not None and (found or self.fold is not None):
            found[self.head] = {"kind": "tied", "embedding": self.embedding, "fold": self.fold}
        elif self.head_settings is not None and self.head is not None:
            found[self.head] = {
                "kind": "head",
                "settings": self.head_settings.to_dict(),
                "columns": self.columns[1],
            }
        return found

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a matrix in the narrower type that was asked for, if one was.

        Raises:
            OutsideError: it has a value that the type cannot hold.
        """
        kind = self.dtypes.get(name.rpartition(".")[0])
        if kind is None or tensor.dtype.itemsize <= 2:
            return tensor
        narrow: Tensor = tensor.to(getattr(torch, kind))
        if not tensor.is_meta and not bool(torch.isfinite(narrow).all()):
            raise OutsideError(f"tensor {name!r} must fit {kind}; store it with 32 bits")
        return narrow


def find_outside(model: PreTrainedModel) -> tuple[str, str | None, bool]:
    """Return the names of embedding and head, and whether they are one matrix."""
    modules = {id(module): name for name, module in model.named_modules()}
    embedding = modules[id(model.get_input_embeddings())]
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = modules.get(id(output)) if isinstance(output, nn.Linear) else None
    tied = head is not None and model.all_tied_weights_keys.get(f"{head}.weight") == (
        f"{embedding}.weight"
    )
    return embedding, head, tied


def plan_outside(
    model: PreTrainedModel, options: Options, came_as: StoredTypes, *, folded: str | None = None
) -> Outside:
    """Decide how embedding and head are stored.

    Args:
        model: The skeleton.
        options: With `embed_bits` and `head_bits`; None for what is recommended: 8 bits where
            layers have at most 4, and no more than the embedding came with.
        came_as: How wide the model came.
        folded: The kind of rotation, for a model whose rotations are folded and whose head was tied
            to the embedding before; the model itself has a head of its own then.

    Raises:
        OutsideError: the bits do not fit the model.
    """
    embedding, head, tied = find_outside(model)
    if options.gguf is not None:  # its own types for both
        return Outside(embedding, head, tied=tied, reasons=("by the GGUF type", "by the GGUF type"))
    tied = tied or folded is not None
    module = model.get_submodule(embedding)
    scale = _scale_of(module)
    embed_bits, head_bits = options.embed_bits, options.head_bits
    if tied and folded is None:
        if None not in (embed_bits, head_bits) and embed_bits != head_bits:
            raise OutsideError(
                f"--head-bits must be {embed_bits}, as --embed-bits, for a head that is tied to "
                f"the embedding, got {head_bits}"
            )
        embed_bits = head_bits = embed_bits if embed_bits is not None else head_bits
    if embed_bits is not None and embed_bits <= BITS[-1] and scale is None:
        raise OutsideError(
            f"--embed-bits must be 16 or 32 for an embedding of class {type(module).__name__}, "
            f"got {embed_bits}"
        )
    if head_bits is not None and head is None:
        raise OutsideError("--head-bits needs a model whose head is nn.Linear; leave it out")
    chosen = recommended_bits(options.layer, came_as) if scale is not None else None
    of_embedding = embed_bits if embed_bits is not None else chosen
    of_head = head_bits if head_bits is not None else (of_embedding if tied else chosen)
    # The head of a folded model is another matrix: with bits of its own it is stored once more.
    apart = folded is not None and of_head != of_embedding
    tied = tied and not apart
    rotated = options.rotate is not None
    dtypes = {}
    for name, bits in ((embedding, of_embedding), (head, of_head)):
        if name is not None and bits == 16:
            dtypes[name] = came_as.matrices or "float16"
    embedding_settings = _settings(options.layer, of_embedding, rotated=rotated)
    if embedding_settings is not None and not tied:
        # Without a Hessian all methods are rounding to the nearest.
        embedding_settings = replace(embedding_settings, method="nearest", npasses=0)
    return Outside(
        embedding,
        head,
        embedding_settings,
        None if tied or head is None else _settings(options.layer, of_head, rotated=rotated),
        tied,
        folded if tied else None,
        _widths(model, embedding, head),
        scale or 1.0,
        dtypes,
        (
            _described(of_embedding, embedding_settings),
            "none"
            if head is None
            else (
                _tied_reason(folded)
                if tied
                else _described(of_head, _settings(options.layer, of_head, rotated=rotated))
            ),
        ),
    )


def recommended_bits(layer: LayerSettings, came_as: StoredTypes) -> int | None:
    """Return the bits for embedding and head where a user names none; None leaves them.

    8 where the layers have at most 4, which loses nothing that can be measured beside them; and no
    more than the embedding came with, since more bits would hold the same values.
    """
    if layer.compat is not None:
        return None
    came = came_as.embedding_bits
    if came is not None and came <= BITS[-1]:
        return max(bits for bits in BITS if bits <= max(came, NARROWEST))
    return 8 if layer.bits <= 4 else None


def _widths(model: nn.Module, embedding: str, head: str | None) -> tuple[int, int]:
    width = model.get_parameter(f"{embedding}.weight").shape[1]
    return width, width if head is None else model.get_parameter(f"{head}.weight").shape[1]


def _scale_of(module: nn.Module) -> float | None:
    """Return what an embedding's class multiplies rows by; None if it does other things."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if type(module) is nn.Embedding:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def _settings(layer: LayerSettings, bits: int | None, *, rotated: bool) -> LayerSettings | None:
    """Return how a matrix of tokens is rounded, after the settings of the layers."""
    if bits is None or bits > BITS[-1]:
        return None
    incoherent = layer.incoherence != "none"
    group_size = layer.group_size
    if group_size == 0 or (group_size < 0 and not incoherent and not rotated):
        group_size = GROUP
    return replace(
        layer,
        bits=bits,
        grid="scalar",
        group_size=group_size,
        incoherence_sides="in",
        # Greedy passes take half of an hour for a large vocabulary, and gain nothing at 8 bits.
        npasses=0 if bits == BITS[-1] and layer.method != "allbal" else layer.npasses,
        compat=None,
        lazy_batch=False,
    )


def _described(bits: int | None, settings: LayerSettings | None) -> str:
    if settings is None:
        return "as it came" if bits in (None, 32) else f"{bits} bits, not quantized"
    groups = "a scale a row" if settings.group_size < 1 else f"groups of {settings.group_size}"
    return f"{settings.bits} bits, {groups}"


def _tied_reason(folded: str | None) -> str:
    if folded is None:
        return "tied to the embedding, stored once"
    return "the embedding's matrix, the folded norm and rotation undone at run time, stored once"
