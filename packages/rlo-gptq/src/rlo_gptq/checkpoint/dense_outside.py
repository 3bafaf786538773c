"""Packed embeddings and heads of a checkpoint as ordinary tensors, for readers of other formats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlo_gptq.checkpoint.outside import OutsideModule
from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead


class DenseOutside:
    """Unpacks the embedding and the head of a checkpoint that is read file by file.

    A tied head stays tied, but one in a model with folded rotations gets a matrix of its own, once
    the tensors it is made of were seen.

    Args:
        modules: From `outside_modules`.
        dtype: Of the dense matrices.
    """

    def __init__(self, modules: Mapping[str, OutsideModule], dtype: torch.dtype) -> None:
        self.modules, self.dtype = modules, dtype
        self.seen: dict[str, Tensor] = {}
        folded = {name: m for name, m in modules.items() if m.kind == "tied" and m.fold}
        self.folded = dict(folded)

    def unpacked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of one file with dense matrices in the place of packed ones."""
        tensors = dict(tensors)
        for name, entry in self.modules.items():
            if entry.settings is None or f"{name}.scales" not in tensors:
                continue
            state = {
                key.removeprefix(f"{name}."): tensors.pop(key)
                for key in list(tensors)
                if key.startswith(f"{name}.") and key != f"{name}.bias"
            }
            tensors[f"{name}.weight"] = _dense(state, entry).to(self.dtype)
        for name, entry in list(self.folded.items()):
            needed = (f"{name}.gain", f"{name}.seed", f"{entry.embedding}.weight")
            self.seen |= {key: tensors[key] for key in needed if key in tensors}
            for key in needed[:2]:
                tensors.pop(key, None)
            if all(key in self.seen for key in needed):
                gain, seed, embedding = (self.seen.pop(key) for key in needed)
                rows, columns = embedding.shape
                head = TiedHead(nn.Embedding(rows, columns, device="meta"), fold=entry.fold)
                head.gain, head.seed = gain, seed
                tensors[f"{name}.weight"] = head.turned(embedding.float()).to(self.dtype)
                del self.folded[name]
        return tensors


def _dense(state: Mapping[str, Tensor], entry: OutsideModule) -> Tensor:
    """Return the dense matrix of a packed one, (rows, columns), float32."""
    assert entry.settings is not None
    rows, columns = len(state["weight"]), entry.columns
    packed: PackedWeight = (
        QuantEmbedding(rows, columns, entry.settings, device="meta")
        if entry.kind == "embedding"
        else QuantLinear(columns, rows, entry.settings, device="meta")
    )
    packed.load_state_dict(dict(state), assign=True)
    return packed.dequantize()
