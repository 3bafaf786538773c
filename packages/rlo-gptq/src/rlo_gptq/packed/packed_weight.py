r"""The packed matrix that layers are made of: codes, grid and transform, as buffers of a module.

With :math:`\hat W' = \text{scale} \cdot (\text{code} - \text{zero})` the matrix is
:math:`\hat W = U^T \hat W' V \operatorname{diag}(s)`. It is unpacked a tile of rows at a time, so
that the dense matrix never exists. The transforms are structured and come from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlo_gptq.packed.packing import pack_codes, packed_words
from rlo_gptq.packed.product import Stored, packed_product
from rlo_gptq.packed.tiles import dequantize_rows, weight_tiles
from rlo_gptq.rounding.grids import groups_of, symmetric_zero
from rlo_gptq.rounding.layer import QuantizedLayer
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.settings import LayerSettings, trellis_state_bits

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT_DTYPE = ("scales", "zeros", "input_scale")
"""Tensors that `.half()` and `.to(dtype)` leave as they are: rounding them changes every weight."""


class PackedWeight(nn.Module):
    """The buffers of a packed matrix and what is computed from them; a base of layers.

    The buffers are `weight` (packed codes, int32, (rows, words)), `scales` (rows, groups), `zeros`
    (only if the grid is not symmetric), `input_scale` (columns,) (only with rescaling), `seed`
    (int64, (1,), only with incoherence) and `order` (int32, (columns,), only if columns are stored
    in another order than inputs come in: stored column j belongs to input `order[j]`). The packed
    tensor is called `weight` on purpose: loaded into an ordinary layer its shape is refused, so
    that a checkpoint never loads as random weights.

    Scales and zeros have `settings.scale_dtype`.
    """

    rows: int
    columns: int
    settings: LayerSettings
    bits: int
    group_size: int
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    seed: Tensor | None
    order: Tensor | None
    _transform: Transform | None

    def make_buffers(
        self,
        rows: int,
        columns: int,
        settings: LayerSettings,
        *,
        device: torch.device | str | None = None,
        permuted: bool = False,
    ) -> None:
        """Register the buffers, empty, to be filled from a checkpoint or by `fill`."""
        self.rows, self.columns = rows, columns
        self.settings, self.bits, self.group_size = settings, settings.bits, settings.group_size
        groups = groups_of(columns, settings.group_size)
        scale_dtype: torch.dtype = getattr(torch, settings.scale_dtype)
        words = packed_words(columns, settings.bits)
        tensors: dict[str, Tensor | None] = {
            "weight": torch.zeros(rows, words, dtype=torch.int32, device=device),
            "scales": torch.zeros(rows, groups, dtype=scale_dtype, device=device),
            "zeros": None,
            "input_scale": None,
            "seed": None,
            "order": None,
        }
        if permuted:
            tensors["order"] = torch.arange(columns, dtype=torch.int32, device=device)
        if not settings.sym:
            tensors["zeros"] = torch.zeros(rows, groups, dtype=scale_dtype, device=device)
        if settings.rescale:
            tensors["input_scale"] = torch.ones(columns, dtype=torch.float32, device=device)
        if settings.incoherence != "none":
            tensors["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._transform = None
        # transformers draws the weights of layers that it did not load itself, at random.
        self._is_hf_initialized = True

    def reset_parameters(self) -> None:
        """Do nothing: there are no weights to draw at random."""

    def fill(self, layer: QuantizedLayer) -> Self:
        """Pack a matrix that was just quantized with `settings`; returns the module."""
        settings = self.settings
        self.weight = pack_codes(layer.codes, settings.bits)
        self.scales = layer.scales.to(self.scales.dtype)
        if settings.grid == "scalar" and settings.sym:
            zero = symmetric_zero(settings.bits, integer=settings.integer_zero)
            if not bool((layer.zeros == zero).all()):
                raise ValueError(f"zeros must all be {zero} for a symmetric grid")
        elif settings.grid == "scalar":
            self.zeros = layer.zeros.to(self.scales.dtype)
        if settings.rescale:
            if layer.input_scale is None:
                raise ValueError("input_scale must be there for a layer with rescale")
            self.input_scale = layer.input_scale.float()
        if settings.incoherence != "none":
            self.seed = torch.tensor([layer.transform.seed], dtype=torch.int64)
        self._transform = None
        return self

    @property
    def transform(self) -> Transform | None:
        """The incoherence transform, made from the seed when first used."""
        if self.seed is None:
            return None
        if self._transform is None:
            self._transform = Transform(
                kind=self.settings.incoherence,
                sides=self.settings.incoherence_sides,
                seed=int(self.seed.item()),
                in_features=self.columns,
                out_features=self.rows,
                variant=self.settings.proj_extra,
            )
        return self._transform

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._transform = None  # another seed
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module, but keep the dtype of the grid: `.half()` must not round scales."""
        kept = {name: getattr(self, name) for name in KEPT_DTYPE}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    @property
    def stored(self) -> Stored:
        """What' as it is stored."""
        return Stored(
            self.weight,
            self.scales,
            self.zeros,
            self.bits,
            self.group_size,
            self.columns,
            symmetric_zero(self.bits, integer=self.settings.integer_zero),
            trellis_state_bits(self.settings.grid) or 0,
        )

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return What x + bias for x of shape (..., columns): (..., rows), in the type of x."""
        transform = self.transform
        inner, scale = x, self.input_scale
        if transform is not None:
            if scale is not None:
                inner, scale = _scaled(x, scale), None
            inner = transform.apply_input(inner)
        turned = transform is not None and transform.sides == "both"
        y = packed_product(
            inner.reshape(-1, self.columns),
            self.stored,
            input_scale=scale,
            order=self.order,
            bias=None if turned else bias,
        ).view(*x.shape[:-1], self.rows)
        if transform is None or not turned:
            return y
        y = transform.apply_output_T(y)
        return y if bias is None else y + bias.to(y.dtype)

    def gather(self, index: Tensor) -> Tensor:
        """Return some rows of What, float32, unpacking no others.

        Args:
            index: Numbers of rows, (n,); the grid must be scalar, and outputs not rotated.
        """
        zero = symmetric_zero(self.bits, integer=self.settings.integer_zero)
        rows = dequantize_rows(
            self.weight.index_select(0, index),
            self.scales.index_select(0, index),
            zero if self.zeros is None else self.zeros.index_select(0, index),
            bits=self.bits,
            columns=self.columns,
            group_size=self.group_size,
            dtype=torch.float32,
        )
        return self._restored(rows)

    def _restored(self, rows: Tensor) -> Tensor:
        """Return rows of What' in the original basis: order, rotation, scale undone."""
        if self.order is not None:
            rows = torch.empty_like(rows).index_copy_(1, self.order.long(), rows)
        if self.transform is not None:
            rows = self.transform.apply_input_T(rows)
        return rows if self.input_scale is None else rows * self.input_scale

    def dequantize(self) -> Tensor:
        """Return the dense matrix in the original basis, (rows, columns), float32."""
        rows = self.stored.rows(torch.float32)
        dense = self.scales.new_empty(self.rows, self.columns, dtype=torch.float32)
        transform = self.transform
        for start, stop in weight_tiles(self.rows, self.columns, self.weight.device):
            tile = rows(start, stop)
            if self.order is not None:
                tile = torch.empty_like(tile).index_copy_(1, self.order.long(), tile)
            dense[start:stop] = tile if transform is None else transform.apply_input_T(tile)
        if transform is not None:
            dense = transform.apply_output_T(dense.T).T if transform.sides == "both" else dense
        return dense if self.input_scale is None else dense.mul_(self.input_scale)

    def described(self) -> str:
        """Return bits, groups and transform, for `extra_repr`."""
        return (
            f"bits={self.bits}, group_size={self.group_size}, "
            f"incoherence={self.settings.incoherence}"
        )


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Return x * scale in the type of x; in one launch where no gradient is recorded."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
    if recorded or torch.compiler.is_compiling() or not x.is_cuda:
        return x * scale.to(x.dtype)
    return torch.mul(x, scale, out=torch.empty_like(x))
