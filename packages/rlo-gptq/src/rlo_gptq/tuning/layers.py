r"""A packed layer whose scales, zeros and input scale have gradients, and whose codes have none.

With one scale for a row, :math:`y = s \odot (C - z) V (i \odot x)` needs two matrix products for
its gradients where a dense layer needs three: what reaches the scales is a sum over tokens of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlo_gptq.packed.packing import unpack_codes
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.unpack_table import unpack_values
from rlo_gptq.rounding.grids import symmetric_zero
from rlo_gptq.rounding.trellis import decode
from rlo_gptq.tuning.parameters import StoredParameter


class TunedLinear(nn.Module):
    """Stands in the model for a `QuantLinear`; its codes are dense only inside `unpacked`.

    Args:
        packed: The layer.
        name: Its full name.
    """

    def __init__(self, packed: QuantLinear, name: str) -> None:
        super().__init__()
        self.packed = [packed]  # not a submodule: its tensors are not trained and do not move
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
        self.bias = packed.bias

    def unpack(self) -> None:
        """Make the codes dense, (m, d), float32, less a symmetric grid's zero."""
        packed = self.packed[0]
        if packed.settings.grid == "trellis":
            codes = unpack_codes(packed.weight, packed.bits, packed.in_features)
            self.unit = decode(codes.T).T.contiguous()
            return
        zero = symmetric_zero(packed.bits, integer=packed.settings.integer_zero)
        self.unit = unpack_values(
            packed.weight, packed.bits, packed.in_features, zero if packed.zeros is None else 0.0
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features); returns (..., out_features)."""
        packed, unit = self.packed[0], self.unit
        if unit is None:
            raise RuntimeError("a tuned layer must be called inside `unpacked`")
        inner = x.float()
        if self.input_scale is not None:
            inner = inner * self.input_scale
        if packed.transform is not None:
            inner = packed.transform.apply_input(inner)
        if packed.order is not None:
            inner = inner.index_select(-1, packed.order)
        if self.scales.shape[1] == 1:
            y = F.linear(inner, unit)
            if self.zeros is not None:
                y = y - inner.sum(-1, keepdim=True) * self.zeros[:, 0]
            y = y * self.scales[:, 0]
        else:
            zeros = 0.0 if self.zeros is None else self._spread(self.zeros)
            y = F.linear(inner, (unit - zeros) * self._spread(self.scales))
        if packed.transform is not None:
            y = packed.transform.apply_output_T(y)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _spread(self, grid: Tensor) -> Tensor:
        """Return (m, groups) as (m, d): each group's number for all of its columns."""
        size, columns = self.packed[0].group_size, self.packed[0].in_features
        return grid.unsqueeze(-1).expand(-1, -1, size).reshape(len(grid), -1)[:, :columns]


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Make the codes of all tuned layers in a module dense for the time of the block."""
    layers = [layer for layer in module.modules() if isinstance(layer, TunedLinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.unpack()
        yield
    finally:
        for layer in layers:
            layer.unit = None
