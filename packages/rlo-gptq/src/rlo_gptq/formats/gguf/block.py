"""A decoder block onto the grids of a GGUF file: the pipeline's, with other layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlo_gptq.formats.gguf.architecture import architecture_of, tensor_name
from rlo_gptq.formats.gguf.finish import mixture_of
from rlo_gptq.formats.gguf.round import BlockLinear, round_to_blocks
from rlo_gptq.formats.gguf.types import BLOCK_TYPES
from rlo_gptq.pipeline.block import BlockQuantizer, PackedLinear


class GGUFBlockQuantizer(BlockQuantizer):
    """Quantizes blocks as `BlockQuantizer` does; layers are packed as the file's mixture says."""

    def _kind(self, linear: nn.Linear, name: str) -> str:
        assert self.options.gguf is not None
        architecture = architecture_of(self.source.config.to_dict())
        mixture = mixture_of(self.source, self.options.gguf)
        return mixture.of(tensor_name(architecture, f"{name}.weight"), linear.in_features)

    def _packed(
        self, linear: nn.Linear, name: str, hessian: Tensor, seed: int
    ) -> tuple[PackedLinear, dict[str, Any]]:
        kind = self._kind(linear, name)
        module = self._empty_like(linear, name)
        if kind in BLOCK_TYPES:
            rounded = round_to_blocks(
                linear.weight, hessian, BLOCK_TYPES[kind], self.options.layer, seed=seed
            )
            packed, proxy = rounded.packed, rounded.proxy
            bits = BLOCK_TYPES[kind].bits_per_weight
        else:  # no block divides its input
            packed = linear.weight.detach().to(torch.float16).contiguous().view(torch.uint8)
            proxy, bits = 0.0, 16.0
        state = {"weight": packed}
        if linear.bias is not None:
            state["bias"] = linear.bias.detach().clone()
        module.load_state_dict(state, assign=True)
        return module, {"type": kind, "bits": bits, "proxy": proxy}

    def _empty_like(self, linear: nn.Linear, name: str) -> PackedLinear:
        return BlockLinear(
            linear.in_features,
            linear.out_features,
            self._kind(linear, name),
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
        )
