"""One layer onto the grid of a GGUF type, by any of the rounding methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlo_gptq.formats.gguf.blocks import pack_blocks, unpack_blocks
from rlo_gptq.formats.gguf.fit import fit_blocks
from rlo_gptq.formats.gguf.grids import BlockGrid
from rlo_gptq.formats.gguf.types import BLOCK_TYPES, BlockType
from rlo_gptq.rounding.grids import Grid
from rlo_gptq.rounding.layer import normalised, proxy_loss
from rlo_gptq.rounding.methods import round_in_parts
from rlo_gptq.settings import LayerSettings

_ROWS = 4096  # of an embedding, rounded at one time


@dataclass(frozen=True)
class RoundedBlocks:
    """The bytes of a layer, (m, bytes) uint8, and its proxy loss as `quantize_layer` gives it."""

    packed: Tensor
    proxy: float


def round_to_blocks(
    weight: Tensor, hessian: Tensor, kind: BlockType, settings: LayerSettings, *, seed: int
) -> RoundedBlocks:
    """Round a weight matrix onto the grid of a GGUF type against the second moment of its inputs.

    The scales of blocks and sub-blocks are fitted to what feedback makes of the weights, the
    integers of the sub-blocks frozen, and codes chosen by `settings.method`; between greedy passes
    the blocks' own scales are refitted by least squares in the Hessian's norm.

    Args:
        weight: W (m, d), any floating type; d a multiple of the block's columns.
        hessian: H (d, d), as `quantize_layer` takes it.
        kind: The type.
        settings: Method, damping, passes; the grid's own settings play no part.
        seed: Of nothing random yet: the methods that draw are refused with these grids.

    Raises:
        ValueError: a shape or a value does not fit.
    """
    W = weight.detach().to(torch.float32)
    H = hessian.detach().to(torch.float32)
    for name, tensor in (("weight", W), ("hessian", H)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got nan or inf")
    if W.shape[1] % kind.columns:
        raise ValueError(
            f"weight must have a multiple of {kind.columns} columns for {kind.name}, "
            f"got {W.shape[1]}"
        )

    def fit(x: Tensor, importance: Tensor, last: bool) -> Grid:
        return fit_blocks(x, importance, kind, thorough=last)

    moment = normalised(H)
    moment.diagonal().add_(settings.percdamp * moment.diagonal().mean())
    rounded = round_in_parts(lambda part: W[part].T, len(W), moment, settings, seed=seed, fit=fit)
    grid = rounded.grid
    assert isinstance(grid, BlockGrid)
    codes = rounded.codes.to(torch.float32)
    columns = torch.arange(W.shape[1], device=W.device)
    values = grid.values(codes, columns).T
    return RoundedBlocks(pack_blocks(codes, grid), proxy_loss(W, values, H))


def nearest_blocks(weight: Tensor, kind: BlockType) -> Tensor:
    """Round a matrix to the nearest values of a fitted grid; returns its bytes (m, bytes).

    Args:
        weight: (m, d), any floating type.
        kind: The type.
    """
    parts = []
    for begin in range(0, len(weight), _ROWS):
        x = weight[begin : begin + _ROWS].detach().to(torch.float32).T.contiguous()
        grid = fit_blocks(x, torch.ones(len(x), device=x.device), kind)
        parts.append(pack_blocks(grid.round_all(x), grid))
    return torch.cat(parts)


class BlockLinear(nn.Module):
    """A linear layer as the bytes of a GGUF type: what a part of an unfinished run holds.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        kind: The type's name; "F16" where no block divides the input.
        bias: Whether there is a bias.
        dtype: Of the bias.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.kind = in_features, kind
        if kind in BLOCK_TYPES:
            size = in_features // BLOCK_TYPES[kind].columns * BLOCK_TYPES[kind].size
        else:
            size = 2 * in_features
        weight = torch.empty(out_features, size, dtype=torch.uint8, device="meta")
        self.register_buffer("weight", weight)
        empty = torch.empty(out_features, dtype=dtype, device="meta") if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))

    def dequantize(self) -> Tensor:
        """Return the weight (out, in), float32."""
        if self.kind in BLOCK_TYPES:
            return unpack_blocks(self.weight, BLOCK_TYPES[self.kind]).to(self.weight.device)
        return self.weight.view(torch.float16).to(torch.float32)
