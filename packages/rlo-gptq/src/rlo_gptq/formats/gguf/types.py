"""The block types of GGUF, and which tensor gets which: llama.cpp's mixtures. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from rlo_core.errors import RLOError


class GGUFError(RLOError):
    """A model, a type or an option that a GGUF file cannot hold."""


@dataclass(frozen=True)
class BlockType:
    """How one block of a row is stored.

    A weight is `d * sub * unit(code) - dmin * min`: d and dmin in half precision, one a block; sub
    and min small integers, one a sub-block.

    Args:
        name: Of the type, as in llama.cpp.
        columns: Weights in a block.
        size: Bytes of a block.
        group: Weights in a sub-block; `columns` where the block is not divided.
        top: The largest code.
        zero: The code of the value 0; 0 where an offset is stored.
        subs: Smallest and largest `sub`. (-1, 1) stands for the sign of d.
        mins: Largest `min`, of a type with an offset; 0 without one.
        levels: Units of the codes, where they are not evenly spaced.
    """

    name: str
    columns: int
    size: int
    group: int
    top: int
    zero: int = 0
    subs: tuple[int, int] = (1, 1)
    mins: int = 0
    levels: tuple[int, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, scales included."""
        return 8 * self.size / self.columns

    @property
    def two_level(self) -> bool:
        """Whether sub-blocks have scales of their own."""
        return self.group < self.columns


_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, 32, 15, zero=8, subs=(-1, 1)),
        BlockType("Q4_1", 32, 20, 32, 15, mins=1),
        BlockType("Q5_0", 32, 22, 32, 31, zero=16, subs=(-1, 1)),
        BlockType("Q5_1", 32, 24, 32, 31, mins=1),
        BlockType("Q8_0", 32, 34, 32, 255, zero=128),
        BlockType("IQ4_NL", 32, 18, 32, 15, subs=(-1, 1), levels=_NL),
        BlockType("Q2_K", 256, 84, 16, 3, subs=(0, 15), mins=15),
        BlockType("Q3_K", 256, 110, 16, 7, zero=4, subs=(-32, 31)),
        BlockType("Q4_K", 256, 144, 32, 15, subs=(0, 63), mins=63),
        BlockType("Q5_K", 256, 176, 32, 31, subs=(0, 63), mins=63),
        BlockType("Q6_K", 256, 210, 16, 63, zero=32, subs=(-128, 127)),
    )
}
"""By name; the sizes are those of llama.cpp's structures."""

FLOAT_TYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types without blocks, and torch's names for them."""

# Where a row is no multiple of 256, llama.cpp takes the next larger type of 32.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip
"""Names of whole files and their numbers (`general.file_type`)."""

QUANTIZED_TYPES: tuple[str, ...] = tuple(
    sorted(set(FILE_TYPES) - set(FLOAT_TYPES), key=lambda name: FILE_TYPES[name])
)
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""What llama.cpp makes of the short names."""


def file_type(name: str) -> str:
    """Return the full name of a file type, e.g. "Q4_K_M" for "q4_k".

    Raises:
        GGUFError: there is no such type.

    Example:
        >>> file_type("q4_k")
        'Q4_K_M'
    """
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in FILE_TYPES:
        close = difflib.get_close_matches(upper, [*FILE_TYPES, *ALIASES], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise GGUFError(
            f"unknown GGUF type {name!r}{hint}; available: {', '.join(QUANTIZED_TYPES)}"
        )
    return upper


@dataclass(frozen=True)
class Mixture:
    """Which type each matrix of a file gets, as llama.cpp's quantizer with an imatrix chooses it.

    Args:
        name: A key of `FILE_TYPES`.
        blocks: Decoder blocks of the model.
        heads_per_group: Attention heads that share one key and value head.
        tied: Whether the output head is the embedding.

    Example:
        >>> mixture = Mixture("Q4_K_M", blocks=16, heads_per_group=4, tied=False)
        >>> mixture.of("blk.0.attn_v.weight", 2048), mixture.of("blk.0.attn_q.weight", 2048)
        ('Q6_K', 'Q4_K')
        >>> mixture.of("blk.0.attn_q.weight", 576)  # no multiple of 256
        'Q5_0'
    """

    name: str
    blocks: int
    heads_per_group: int
    tied: bool

    def of(self, tensor: str, columns: int) -> str:
        """Return the type of a matrix whose rows have `columns` weights: of `BLOCK_TYPES`, or "F16"
        where no block divides the row.
        """
        if self.name in FLOAT_TYPES:
            return self.name
        chosen = self._chosen(tensor)
        if columns % BLOCK_TYPES[chosen].columns:
            chosen = _FALLBACK.get(chosen, chosen)
        return "F16" if columns % BLOCK_TYPES[chosen].columns else chosen

    @property
    def base(self) -> str:
        """The type of most matrices."""
        return self.name.removesuffix("_S").removesuffix("_M").removesuffix("_L")

    def _chosen(self, tensor: str) -> str:
        if tensor == "output.weight" or (self.tied and tensor == "token_embd.weight"):
            return "Q8_0" if self.name == "Q8_0" else "Q6_K"
        part = tensor.rpartition("blk.")[2].partition(".")
        index, kind = (int(part[0]), part[2]) if part[1] and part[0].isdigit() else (0, tensor)
        if kind == "attn_v.weight":
            return self._value(index)
        if kind == "ffn_down.weight":
            return self._down(index)
        if kind == "attn_output.weight":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.name, self.base)
        return self.base

    def _value(self, index: int) -> str:
        many = self.heads_per_group >= 4
        chosen = {
            "Q2_K": "Q4_K" if many else "Q3_K",
            "Q2_K_S": "Q4_K" if many else "Q2_K",
            "IQ4_NL": "Q5_K" if many else "IQ4_NL",
            "Q3_K_M": "Q5_K" if index < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if index < 4 else "Q4_K",
            "Q4_K_M": "Q6_K" if self._sensitive(index) else "Q4_K",
            "Q5_K_M": "Q6_K" if self._sensitive(index) else "Q5_K",
        }
        return chosen.get(self.name, self.base)

    def _down(self, index: int) -> str:
        early = index < self.blocks // 8
        chosen = {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if early else "Q2_K",
            "Q3_K_M": "Q5_K" if index < self.blocks // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if early else "Q4_K",
            "Q4_K_M": "Q6_K" if self._sensitive(index) else "Q4_K",
            "Q5_K_M": "Q6_K" if self._sensitive(index) else "Q5_K",
            "Q4_0": "Q4_1" if early else "Q4_0",
            "Q5_0": "Q5_1" if early else "Q5_0",
        }
        return chosen.get(self.name, self.base)

    def _sensitive(self, index: int) -> bool:
        """Whether a block is among the first and the last eighth, or every third between."""
        eighth = self.blocks // 8
        return index < eighth or index >= 7 * self.blocks // 8 or (index - eighth) % 3 == 2
