r"""A linear layer whose weight stays packed: :math:`y = U^T (\hat W' (V (s \odot x))) + b`.

:math:`\hat W' = \text{scale} \cdot (\text{code} - \text{zero})` is made a tile of rows at a time,
so that the dense matrix never exists. The transforms are structured and come from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlo_gptq.packed.packing import pack_codes, packed_words, unpack_codes
from rlo_gptq.packed.tiles import PackedMatmul, dequantize_rows, weight_tiles
from rlo_gptq.packed.unpack_table import unpack_values
from rlo_gptq.rounding.grids import groups_of, symmetric_zero
from rlo_gptq.rounding.layer import QuantizedLayer
from rlo_gptq.rounding.rotation import Transform
from rlo_gptq.rounding.trellis import decode_rows
from rlo_gptq.settings import LayerSettings

KEPT_DTYPE = ("scales", "zeros", "input_scale")
"""Tensors that `.half()` and `.to(dtype)` leave as they are: rounding them changes every weight."""

# Rows of inputs up to which the CUDA kernel multiplies; with more, tiles unpacked for a matrix
# product pay.
FEW_ROWS = 16


class QuantLinear(nn.Linear):
    """A packed linear layer, see the module's docstring; made empty, to be filled from a
    checkpoint.

    Its tensors are buffers named `weight` (packed codes, int32, (out, words)), `scales` (out,
    groups), `zeros` (only if the grid is not symmetric), `input_scale` (only with rescaling),
    `seed` (int64, (1,), only with incoherence) and `bias`. The packed tensor is called `weight` on
    purpose: loaded into an ordinary linear layer its shape is refused, so that a checkpoint never
    loads as random weights.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        settings: How the layer was quantized; decides which tensors there are.
        bias: Whether there is a bias.
        dtype: Of the bias.
        device: Where the tensors are made.
        permuted: Whether columns are stored in another order than inputs come in, as in a GPTQ
            checkpoint with act-order, whose groups are no runs of columns; adds the buffer `order`
            (int32, (in,)): stored column j belongs to input `order[j]`.

    Scales and zeros have `settings.scale_dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: LayerSettings,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        permuted: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make the dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.bits = settings.bits
        self.group_size = settings.group_size
        self.settings = settings
        groups = groups_of(in_features, settings.group_size)
        scale_dtype: torch.dtype = getattr(torch, settings.scale_dtype)
        words = packed_words(in_features, settings.bits)
        tensors: dict[str, Tensor | None] = {
            "weight": torch.zeros(out_features, words, dtype=torch.int32, device=device),
            "scales": torch.zeros(out_features, groups, dtype=scale_dtype, device=device),
            "zeros": None,
            "input_scale": None,
            "seed": None,
            "order": None,
        }
        if permuted:
            tensors["order"] = torch.arange(in_features, dtype=torch.int32, device=device)
        if not settings.sym:
            tensors["zeros"] = torch.zeros(out_features, groups, dtype=scale_dtype, device=device)
        if settings.rescale:
            tensors["input_scale"] = torch.ones(in_features, dtype=torch.float32, device=device)
        if settings.incoherence != "none":
            tensors["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        # A parameter, as in any linear layer; frozen, as the weight is.
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))
        self._transform: Transform | None = None
        # transformers draws the weights of linear layers that it did not load itself, at random.
        self._is_hf_initialized = True

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    seed: Tensor | None
    order: Tensor | None

    def reset_parameters(self) -> None:
        """Do nothing: there are no weights to draw at random."""

    @classmethod
    def from_layer(
        cls, layer: QuantizedLayer, settings: LayerSettings, *, bias: Tensor | None = None
    ) -> QuantLinear:
        """Pack a layer that was just quantized.

        Args:
            layer: From `quantize_layer`.
            settings: Those it was quantized with.
            bias: Shape (out,), or None.
        """
        out_features, in_features = layer.codes.shape
        module = cls(
            in_features,
            out_features,
            settings,
            bias=bias is not None,
            dtype=None if bias is None else bias.dtype,
            device="meta",
        )
        module.weight = pack_codes(layer.codes, settings.bits)
        module.scales = layer.scales.to(module.scales.dtype)
        if settings.grid == "scalar" and settings.sym:
            zero = symmetric_zero(settings.bits, integer=settings.integer_zero)
            if not bool((layer.zeros == zero).all()):
                raise ValueError(f"zeros must all be {zero} for a symmetric grid")
        elif settings.grid == "scalar":
            module.zeros = layer.zeros.to(module.scales.dtype)
        if settings.rescale:
            if layer.input_scale is None:
                raise ValueError("input_scale must be there for a layer with rescale")
            module.input_scale = layer.input_scale.float()
        if settings.incoherence != "none":
            module.seed = torch.tensor([layer.transform.seed], dtype=torch.int64)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), False)
        return module

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
                in_features=self.in_features,
                out_features=self.out_features,
                variant=self.settings.proj_extra,
            )
        return self._transform

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._transform = None  # another seed
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move like any module, but keep the dtype of the grid: `.half()` must not round scales."""
        kept = {name: getattr(self, name) for name in KEPT_DTYPE}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _rows(self, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
        zero = symmetric_zero(self.bits, integer=self.settings.integer_zero)

        def codes(start: int, stop: int) -> Tensor:
            return unpack_codes(self.weight[start:stop], self.bits, self.in_features)

        def trellis_rows(start: int, stop: int) -> Tensor:
            unit = decode_rows(codes, self.out_features, start, stop)
            scale = self.scales[start:stop].float()
            if scale.shape[1] > 1:
                scale = scale.repeat_interleave(self.group_size, 1)[:, : self.in_features]
            return unit.mul_(scale).to(dtype)

        def rows(start: int, stop: int) -> Tensor:
            return dequantize_rows(
                self.weight[start:stop],
                self.scales[start:stop],
                zero if self.zeros is None else self.zeros[start:stop],
                bits=self.bits,
                columns=self.in_features,
                group_size=self.group_size,
                dtype=dtype,
            )

        return trellis_rows if self.settings.grid == "trellis" else rows

    def _unscaled(
        self, dtype: torch.dtype
    ) -> tuple[Callable[[int, int], Tensor] | None, Tensor | None]:
        """Return code - zero by rows, and the scales of the rows, where that is all of a weight.

        With one scale for a row the product is scaled instead of the weights.
        """
        if dtype != torch.float32 or self.settings.grid != "scalar" or self.scales.shape[1] > 1:
            return None, None
        zero = symmetric_zero(self.bits, integer=self.settings.integer_zero)

        def units(start: int, stop: int) -> Tensor:
            at = 0.0 if self.zeros is not None else zero
            values = unpack_values(self.weight[start:stop], self.bits, self.in_features, at)
            return values if self.zeros is None else values.sub_(self.zeros[start:stop].float())

        return units, self.scales[:, 0].float()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features); returns (..., out_features)."""
        transform = self.transform
        inner = x
        if self.input_scale is not None:
            inner = inner * self.input_scale.to(x.dtype)
        if transform is not None:
            inner = transform.apply_input(inner)
        if self.order is not None:
            inner = inner.index_select(-1, self.order)
        flat = inner.reshape(-1, self.in_features)
        y: Tensor = (
            self._packed_matmul(flat)
            if self._kernel_applies(flat)
            else PackedMatmul.apply(
                flat, self._rows(flat.dtype), self.out_features, *self._unscaled(flat.dtype)
            )
        )
        y = y.view(*x.shape[:-1], self.out_features)
        if transform is not None:
            y = transform.apply_output_T(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _kernel_applies(self, x: Tensor) -> bool:
        """Return whether the CUDA kernel for few rows can do this product, (n, in_features)."""
        return (
            x.is_cuda
            and x.shape[0] <= FEW_ROWS
            and not x.requires_grad
            and self.settings.grid == "scalar"
            and find_spec("triton") is not None
        )

    def _packed_matmul(self, x: Tensor) -> Tensor:
        from rlo_gptq.packed.matmul_kernel import packed_matmul

        zero = symmetric_zero(self.bits, integer=self.settings.integer_zero)
        return packed_matmul(
            x,
            self.weight,
            self.scales,
            zero if self.zeros is None else self.zeros,
            bits=self.bits,
            group_size=self.group_size,
        )

    def dequantize(self) -> Tensor:
        """Return the dense weight in the original basis, (out, in), float32."""
        rows = self._rows(torch.float32)
        dense = self.scales.new_empty(self.out_features, self.in_features, dtype=torch.float32)
        transform = self.transform
        for start, stop in weight_tiles(self.out_features, self.in_features):
            tile = rows(start, stop)
            if self.order is not None:
                tile = torch.empty_like(tile).index_copy_(1, self.order.long(), tile)
            dense[start:stop] = tile if transform is None else transform.apply_input_T(tile)
        if transform is not None:
            dense = transform.apply_output_T(dense.T).T if transform.sides == "both" else dense
        return dense if self.input_scale is None else dense.mul_(self.input_scale)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an ordinary linear layer with the dequantised weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.dequantize().to(dtype or torch.float32), False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype or self.bias.dtype), False)
        return linear

    def extra_repr(self) -> str:
        """Name widths, bits and transform, as torch prints modules."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, incoherence={self.settings.incoherence}, "
            f"bias={self.bias is not None}"
        )
