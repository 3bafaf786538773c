"""A token embedding whose matrix stays packed: rows are looked up without unpacking the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantEmbedding(PackedWeight, nn.Embedding):
    r"""Row `token` of :math:`\hat W`, times `scale`. See `PackedWeight` for the buffers.

    Args:
        num_embeddings: Rows, the size of the vocabulary.
        embedding_dim: Width of a row.
        settings: How the matrix was quantized: a scalar grid, and no rotation of the outputs, which
            would mix rows.
        scale: What the model's class multiplies rows by (Gemma 3).
        padding_idx: As in `nn.Embedding`; kept for those who ask.
        dtype: Of the rows that are returned; follows `.half()`, `.to(dtype)`.
        device: Where the tensors are made.

    Raises:
        ValueError: the settings do not allow single rows to be read.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        settings: LayerSettings,
        *,
        scale: float = 1.0,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's, which would make the dense weight
        if settings.grid != "scalar":
            raise ValueError(f"grid must be 'scalar' for an embedding, got {settings.grid!r}")
        if settings.incoherence != "none" and settings.incoherence_sides != "in":
            raise ValueError("incoherence_sides must be 'in' for an embedding, got 'both'")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.scale = scale
        self.dtype = dtype or torch.get_default_dtype()
        self.make_buffers(num_embeddings, embedding_dim, settings, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of token ids (...): (..., embedding_dim), in `dtype`."""
        rows = self.gather(input.reshape(-1)).to(self.dtype)
        if self.scale != 1.0:
            rows = rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)
        return rows.view(*input.shape, self.embedding_dim)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return an embedding with the dequantised matrix, which multiplies by `scale` too."""
        dense = ScaledEmbedding(
            self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta"
        )
        dense.scale = self.scale
        dense.weight = nn.Parameter(self.dequantize().to(dtype or self.dtype), False)
        return dense

    def extra_repr(self) -> str:
        """Name sizes, bits and transform, as torch prints modules."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.described()}"


class ScaledEmbedding(nn.Embedding):
    """An ordinary embedding whose rows are multiplied by `scale`."""

    scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of token ids, times `scale`."""
        rows = super().forward(input)
        return rows if self.scale == 1.0 else rows * rows.new_tensor(self.scale)
