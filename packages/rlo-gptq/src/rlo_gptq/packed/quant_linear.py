r"""A linear layer whose weight stays packed: :math:`y = U^T (\hat W' (V (s \odot x))) + b`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.rounding.layer import QuantizedLayer
from rlo_gptq.settings import LayerSettings


class QuantLinear(PackedWeight, nn.Linear):
    """A packed linear layer; made empty, to be filled from a checkpoint. See `PackedWeight`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        settings: How the layer was quantized; decides which tensors there are.
        bias: Whether there is a bias.
        dtype: Of the bias.
        device: Where the tensors are made.
        permuted: Whether columns are stored in another order than inputs come in, as in a GPTQ
            checkpoint with act-order, whose groups are no runs of columns.
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
        self.make_buffers(out_features, in_features, settings, device=device, permuted=permuted)
        # A parameter, as in any linear layer; frozen, as the weight is.
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))

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
        ).fill(layer)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features); returns (..., out_features)."""
        return self.multiply(x, self.bias)

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
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.described()}, bias={self.bias is not None}"
        )
