r"""Packed matrices whose scales, zeros and input scales have gradients, and whose codes have none.

They stand in the model for what is packed: linear layers, the token embedding, and a head that
reads the embedding's matrix. In a block, whose layers many sequences pass, codes are made dense for
the time of the block; outside of the blocks they are dense a tile of rows at a time, so that of a
head with a hundred thousand rows there is never more than a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.packing import unpack_codes
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.packed.unpack_table import unpack_values
from rlo_gptq.rounding.grids import symmetric_zero
from rlo_gptq.rounding.trellis import decode_rows, trellis_of
from rlo_gptq.tuning.parameters import StoredParameter
from rlo_gptq.tuning.product import spread, tiled_product


class TunedWeight(nn.Module):
    r"""The grid of a packed matrix as trained tensors.

    With one scale for a row, :math:`y = s \odot (C - z) V (i \odot x)` needs two matrix products
    for its gradients where a dense layer needs three: what reaches the scales is a sum over tokens
    of y.

    Args:
        packed: The matrix.
        name: Its full name.
    """

    def __init__(self, packed: PackedWeight, name: str) -> None:
        super().__init__()
        self._of = (packed,)  # no submodule: its tensors are not trained and do not move
        self.unit: Tensor | None = None
        settings = packed.settings
        whole = settings.group_size == 0  # one scale for the matrix stays one
        scales = packed.scales[:1, :1] if whole else packed.scales
        self.scales = nn.Parameter(scales.float().clone())
        self.trained = [
            StoredParameter(
                f"{name}.scales",
                self.scales,
                packed.scales.dtype,
                relative=True,
                shape=packed.scales.shape,
            )
        ]
        self.zeros: Tensor | None = None
        if packed.zeros is not None:
            zeros = packed.zeros[:1, :1] if whole else packed.zeros
            self.zeros = nn.Parameter(zeros.float().clone(), requires_grad=False)
            if not settings.integer_zero:
                self.trained.append(
                    StoredParameter(
                        f"{name}.zeros",
                        self.zeros,
                        packed.zeros.dtype,
                        unit=1.0,
                        shape=packed.zeros.shape,
                    )
                )
        self.input_scale: Tensor | None = None
        if packed.input_scale is not None:
            self.input_scale = nn.Parameter(packed.input_scale.float().clone())
            self.trained.append(
                StoredParameter(
                    f"{name}.input_scale",
                    self.input_scale,
                    packed.input_scale.dtype,
                    relative=True,
                )
            )

    @property
    def packed(self) -> PackedWeight:
        """What is tuned."""
        return self._of[0]

    def units(self, start: int, stop: int) -> Tensor:
        """Return what scales multiply in some rows, (some, d), float32, zeros not yet taken off."""
        packed = self.packed
        trellis = trellis_of(packed.settings.grid, packed.bits)
        if trellis is not None:
            return decode_rows(
                lambda a, b: unpack_codes(packed.weight[a:b], packed.bits, packed.columns),
                trellis,
                packed.rows,
                start,
                stop,
            )
        return unpack_values(packed.weight[start:stop], packed.bits, packed.columns, self._zero)

    @property
    def _zero(self) -> float:
        """The zero of a symmetric grid; of another, 0: it has a tensor of them."""
        packed = self.packed
        if packed.zeros is not None:
            return 0.0
        return symmetric_zero(packed.bits, integer=packed.settings.integer_zero)

    def unpack(self) -> None:
        """Make the codes dense, (m, d), float32."""
        self.unit = self.units(0, self.packed.rows).contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        """Return What x for x of shape (..., d): (..., m), float32."""
        packed = self.packed
        inner = x.float()
        if self.input_scale is not None:
            inner = inner * self.input_scale
        if packed.transform is not None:
            inner = packed.transform.apply_input(inner)
        if packed.order is not None:
            inner = inner.index_select(-1, packed.order)
        y = self._in_tiles(inner) if self.unit is None else self._dense(inner, self.unit)
        return y if packed.transform is None else packed.transform.apply_output_T(y)

    def _dense(self, inner: Tensor, unit: Tensor) -> Tensor:
        if self.scales.shape[1] == 1:
            y = F.linear(inner, unit)
            if self.zeros is not None:
                y = y - inner.sum(-1, keepdim=True) * self.zeros[:, 0]
            return y * self.scales[:, 0]
        size, d = self.packed.group_size, self.packed.columns
        zeros = 0.0 if self.zeros is None else spread(self.zeros, size, d)
        return F.linear(inner, (unit - zeros) * spread(self.scales, size, d))

    def _in_tiles(self, inner: Tensor) -> Tensor:
        packed = self.packed
        rows = packed.rows
        y = tiled_product(
            inner.reshape(-1, packed.columns),
            self.scales.expand(rows, -1),
            None if self.zeros is None else self.zeros.expand(rows, -1),
            self.units,
            packed.group_size,
        )
        return y.view(*inner.shape[:-1], rows)


class TunedLinear(TunedWeight):
    """Stands in the model for a `QuantLinear`."""

    def __init__(self, packed: QuantLinear, name: str) -> None:
        super().__init__(packed, name)
        self.bias = packed.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features); returns (..., out_features)."""
        y = self.multiply(x)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class TunedEmbedding(TunedWeight):
    """Stands in the model for a `QuantEmbedding`."""

    def __init__(self, packed: QuantEmbedding, name: str) -> None:
        super().__init__(packed, name)
        self.scale, self.dtype = packed.scale, packed.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of token ids (...): (..., embedding_dim)."""
        packed, ids = self.packed, input.reshape(-1)
        d, size = packed.columns, packed.group_size
        rows = unpack_values(packed.weight.index_select(0, ids), packed.bits, d, self._zero)
        if self.zeros is not None:
            rows = rows - spread(self._of_rows(self.zeros, ids), size, d)
        rows = rows * spread(self._of_rows(self.scales, ids), size, d)
        if packed.order is not None:
            rows = rows.index_select(1, torch.argsort(packed.order))
        if packed.transform is not None:
            rows = packed.transform.apply_input_T(rows)
        if self.input_scale is not None:
            rows = rows * self.input_scale
        return (rows * self.scale).to(self.dtype).view(*input.shape, d)

    @staticmethod
    def _of_rows(grid: Tensor, ids: Tensor) -> Tensor:
        return grid if len(grid) == 1 else grid.index_select(0, ids)


class TunedHead(nn.Module):
    """Stands in the model for a `TiedHead`: the embedding's matrix is trained through it too.

    Args:
        head: What it stands for.
        embedding: Whose matrix it reads, packed or not.
        name: Its full name.
    """

    def __init__(self, head: TiedHead, embedding: TunedEmbedding | nn.Embedding, name: str) -> None:
        super().__init__()
        self._of = (head, embedding)  # no submodules
        self.bias = head.bias
        self.gain: nn.Parameter | None = None
        self.trained: list[StoredParameter] = []
        if head.gain is not None:
            self.gain = nn.Parameter(head.gain.clone())
            self.trained.append(StoredParameter(f"{name}.gain", self.gain, head.gain.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) of hidden states (..., width)."""
        head, embedding = self._of
        inner = head.turned(x, self.gain)
        if isinstance(embedding, TunedEmbedding):
            y = embedding.multiply(inner)
        else:
            y = F.linear(inner, embedding.weight)
        return y if self.bias is None else y + self.bias


@contextmanager
def unpacked(block: nn.Module) -> Iterator[None]:
    """Make the codes of all tuned layers of a block dense for the time of the block."""
    layers = [layer for layer in block.modules() if isinstance(layer, TunedWeight)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.unpack()
        yield
    finally:
        for layer in layers:
            layer.unit = None


def stand_in(model: nn.Module, *, outside: bool) -> list[StoredParameter]:
    """Put tuned modules in the place of packed ones; return what of them is trained.

    Args:
        model: With packed modules, which may be on the meta device.
        outside: Whether embedding and head are trained; otherwise they stay as they are.
    """
    head_of: Any = getattr(model, "get_output_embeddings", None)
    ends = {id(head_of())} if head_of is not None else set()
    named = list(model.named_modules())
    tuned: dict[int, TunedEmbedding] = {}
    found: list[StoredParameter] = []
    # Embeddings first: a head that reads one has to find it.
    for name, module in sorted(named, key=lambda item: isinstance(item[1], TiedHead)):
        new: TunedLinear | TunedEmbedding | TunedHead
        if isinstance(module, QuantLinear) and (outside or id(module) not in ends):
            new = TunedLinear(module, name)
        elif isinstance(module, QuantEmbedding) and outside:
            new = tuned[id(module)] = TunedEmbedding(module, name)
        elif isinstance(module, TiedHead) and outside:
            new = TunedHead(module, tuned.get(id(module.embedding), module.embedding), name)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        found += new.trained
    return found
