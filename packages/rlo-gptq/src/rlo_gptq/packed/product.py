r"""The product with a packed matrix: by the CUDA kernels for few rows, else by unpacked tiles.

While compiling it is one operator, which torch.compile keeps whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, library

from rlo_gptq.packed.packing import unpack_codes
from rlo_gptq.packed.tiles import PackedMatmul, dequantize_rows, weight_tiles
from rlo_gptq.packed.unpack_table import unpack_values
from rlo_gptq.rounding.trellis import Trellis, decode_rows

OF_KERNEL = (2, 10)
"""Bits and bits of a state of the trellis that the CUDA kernel reads."""
# Rows of inputs up to which the CUDA kernel multiplies; with more, tiles unpacked for a matrix
# product pay.
FEW_ROWS = 16


@dataclass(frozen=True)
class Stored:
    """A matrix What' as it is stored: codes, grid, and how to read them."""

    weight: Tensor
    """int32, (m, words)."""
    scales: Tensor
    """(m, groups)."""
    zeros: Tensor | None
    """(m, groups), or None where all are `zero`."""
    bits: int
    group_size: int
    columns: int
    zero: float
    trellis: int
    """Bits of a state; 0 for a scalar grid."""

    def rows(self, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
        """Return the function from a range of rows to the rows of What', (some, columns)."""
        return functools.partial(self._trellis_rows if self.trellis else self._scalar_rows, dtype)

    def _codes(self, start: int, stop: int) -> Tensor:
        return unpack_codes(self.weight[start:stop], self.bits, self.columns)

    def _trellis_rows(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        unit = decode_rows(
            self._codes, Trellis(self.bits, self.trellis), len(self.weight), start, stop
        )
        scale = self.scales[start:stop].float()
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.group_size, 1)[:, : self.columns]
        return unit.mul_(scale).to(dtype)

    def _scalar_rows(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return dequantize_rows(
            self.weight[start:stop],
            self.scales[start:stop],
            self.zero if self.zeros is None else self.zeros[start:stop],
            bits=self.bits,
            columns=self.columns,
            group_size=self.group_size,
            dtype=dtype,
        )

    def unscaled(
        self, dtype: torch.dtype
    ) -> tuple[Callable[[int, int], Tensor] | None, Tensor | None]:
        """Return code - zero by rows, and the scales of the rows, where that is all of a weight.

        With one scale for a row the product is scaled instead of the weights.
        """
        if dtype != torch.float32 or self.trellis or self.scales.shape[1] > 1:
            return None, None
        return self._units, self.scales[:, 0].float()

    def _units(self, start: int, stop: int) -> Tensor:
        at = 0.0 if self.zeros is not None else self.zero
        values = unpack_values(self.weight[start:stop], self.bits, self.columns, at)
        return values if self.zeros is None else values.sub_(self.zeros[start:stop].float())


@functools.lru_cache(maxsize=64)
def _trellis_tables(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the states, and the rows of each state, on a device."""
    with torch.inference_mode(False):
        trellis = Trellis(*OF_KERNEL)
        return trellis.values(device), trellis.rows_of_states(m).to(device, torch.int32)


def kernel_applies(x: Tensor, stored: Stored) -> bool:
    """Whether the CUDA kernels can do this product, (n, columns)."""
    if not x.is_cuda or x.shape[0] > FEW_ROWS or x.dtype == torch.float64:
        return False
    if stored.trellis and (stored.bits, stored.trellis) != OF_KERNEL:
        return False
    if find_spec("triton") is None:
        return False
    from rlo_gptq.packed.matmul_kernel import kernel_lanes

    groups = stored.scales.shape[1]
    return (
        kernel_lanes(stored.bits, stored.group_size, groups, trellis=stored.trellis > 0) is not None
    )


def packed_product(
    x: Tensor,
    stored: Stored,
    *,
    input_scale: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return (input_scale x)[order] What'^T + bias, (n, m), in the type of x.

    Args:
        x: (n, columns), floating.
        stored: The matrix.
        input_scale: (columns,) or None.
        order: int32, (columns,): stored column j belongs to input order[j]; or None.
        bias: (m) or None.
    """
    trained = (x, input_scale, bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    compiling = torch.compiler.is_compiling()
    if not compiling and not recorded and kernel_applies(x, stored):
        return _by_kernel(x, stored, input_scale=input_scale, order=order, bias=bias)
    if input_scale is not None:
        x = x * input_scale.to(x.dtype)
    if order is not None:
        x = x.index_select(-1, order)
    if compiling:
        y: Tensor = product_operator(x, *_arguments(stored))
    else:
        y = _by_tiles(x, stored)
    return y if bias is None else y + bias.to(y.dtype)


def _by_tiles(x: Tensor, stored: Stored) -> Tensor:
    y: Tensor = PackedMatmul.apply(
        x, stored.rows(x.dtype), len(stored.weight), *stored.unscaled(x.dtype)
    )
    return y


def _by_kernel(x: Tensor, stored: Stored, **around: Tensor | None) -> Tensor:
    from rlo_gptq.packed.matmul_kernel import packed_matmul

    return packed_matmul(
        x,
        stored.weight,
        stored.scales,
        stored.zero if stored.zeros is None else stored.zeros,
        bits=stored.bits,
        group_size=stored.group_size,
        trellis=_trellis_tables(len(stored.weight), x.device) if stored.trellis else None,
        **around,
    )


ARGUMENTS = (
    "Tensor weight, Tensor scales, Tensor? zeros, int bits, int group_size, int columns, "
    "float zero, int trellis"
)


def _arguments(stored: Stored) -> tuple[Any, ...]:
    return (
        stored.weight,
        stored.scales,
        stored.zeros,
        stored.bits,
        stored.group_size,
        stored.columns,
        stored.zero,
        stored.trellis,
    )


def _product(x: Tensor, *arguments: Any) -> Tensor:
    stored = Stored(*arguments)
    if kernel_applies(x, stored):
        return _by_kernel(x, stored)
    return _by_tiles(x, stored)


def _product_backward(grad: Tensor, *arguments: Any) -> Tensor:
    stored = Stored(*arguments)
    total = grad.new_zeros(grad.shape[0], stored.columns)
    rows = stored.rows(grad.dtype)
    for start, stop in weight_tiles(len(stored.weight), stored.columns, grad.device):
        total.addmm_(grad[:, start:stop], rows(start, stop))
    return total


product_operator = library.custom_op(
    "rlo_gptq::packed_product",
    _product,
    mutates_args=(),
    schema=f"(Tensor x, {ARGUMENTS}) -> Tensor",
)
product_backward_operator = library.custom_op(
    "rlo_gptq::packed_product_backward",
    _product_backward,
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}) -> Tensor",
)


@product_operator.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@product_backward_operator.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], Stored(*arguments).columns)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (product_backward_operator(grad, *ctx.arguments), *(None,) * len(ctx.arguments))


product_operator.register_autograd(_backward, setup_context=_context)
