"""Our packed linear layers inside vLLM; imported by `vllm_plugin.register`, needs vLLM.

vLLM joins q, k and v (and gate and up) to one layer, while each of ours has a rotation of its own:
a joined layer holds its parts and runs them one after the other. Exercised on the CPU, layer by
layer, with vLLM 0.32; not yet served on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from rlo_gptq.checkpoint.validation import CheckpointError, check_values
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.settings import LayerSettings

METHOD = "rlo-gptq"
_SHARDS = {"q": 0, "k": 1, "v": 2}


def part_index(shard: str | int | None) -> int:
    """Return the number of a part from vLLM's name for it: q, k, v, a number or nothing."""
    if shard is None:
        return 0
    return _SHARDS[shard] if isinstance(shard, str) else int(shard)


def quantized_parts(
    prefix: str, blocks: str, modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]
) -> bool:
    """Return whether the layer at `prefix`, perhaps a joined one, is quantized.

    Args:
        prefix: Its name in vLLM's model, e.g. "model.layers.3.self_attn.qkv_proj".
        blocks: Path of the decoder blocks in the checkpoint.
        modules: `RLOGPTQConfig.modules`.
        packed: vLLM's joined names and what is in each.

    Raises:
        CheckpointError: some parts of a joined layer are quantized and some are not.
    """
    if not prefix.startswith(f"{blocks}."):
        return False
    number, _, inside = prefix[len(blocks) + 1 :].partition(".")
    parent, _, last = inside.rpartition(".")
    names = [f"{parent}.{part}" if parent else part for part in packed.get(last, [last])]
    present = [
        name in modules and (modules[name] is None or int(number) in modules[name])
        for name in names
    ]
    if any(present) != all(present):
        raise CheckpointError(
            f"layer {prefix!r} must be quantized in all of its parts, got {names}"
        )
    return all(present)


@register_quantization_config(METHOD)
class VLLMConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's view of the checkpoint's `quantization_config`."""

    def __init__(self, settings: LayerSettings, blocks: str, modules: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.blocks = blocks
        self.modules = modules

    def get_name(self) -> str:
        """Return "rlo-gptq"."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types that activations may have."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least CUDA capability: plain torch operations need no more than vLLM does."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMConfig:
        """Build it from config.json's `quantization_config`."""
        if config.get("permuted"):
            raise ValueError("columns must be in their own order to be served, got act-order's")
        if config.get("outside"):
            raise ValueError(
                "embedding and head must be dense to be served by vLLM, got "
                f"{', '.join(sorted(config['outside']))} packed; quantize with --embed-bits 16 "
                "--head-bits 16"
            )
        if config.get("bits"):
            raise ValueError(
                "layers must share one number of bits to be served by vLLM, got several; quantize "
                "without --bits, --bytes and --average-bits"
            )
        return cls(LayerSettings.from_dict(config["settings"]), config["blocks"], config["modules"])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how a layer is run: packed, as it is, or None if it is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        if quantized_parts(prefix, self.blocks, self.modules, self.packed_modules_mapping):
            return PackedLinearMethod(self.settings)
        return UnquantizedLinearMethod()


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads the parts of a layer and runs each as a `QuantLinear`."""

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make empty tensors that vLLM's loaders fill, part by part."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(
                "tensor_parallel_size must be 1 for rlo-gptq: a rotated layer cannot be cut; "
                "use pipeline parallelism, or export with --format gptq"
            )
        parts = [
            QuantLinear(input_size, rows, self.settings, device=torch.get_default_device())
            for rows in output_partition_sizes
        ]
        # Kept out of the module tree until they are filled: vLLM loads by parameter name.
        layer.__dict__["_rlo_parts"] = parts
        for name, tensor in parts[0].named_buffers():
            marker = nn.Parameter(torch.empty(0, dtype=tensor.dtype), requires_grad=False)
            marker.weight_loader = _loader(parts, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, marker)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the filled parts and put them into the layer."""
        parts = layer.__dict__.pop("_rlo_parts", None)
        if parts is None:
            return
        for name, _ in list(parts[0].named_buffers()):
            delattr(layer, name)
        for number, part in enumerate(parts):
            check_values(f"part {number}", part)
        layer.rlo_parts = nn.ModuleList(parts)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs of all parts, side by side."""
        parts = layer.rlo_parts
        assert isinstance(parts, nn.ModuleList)
        y = torch.cat([part(x) for part in parts], dim=-1) if len(parts) > 1 else parts[0](x)
        return y if bias is None else y + bias


def _loader(parts: Sequence[QuantLinear], name: str) -> Callable[..., None]:
    def load(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        tensor = getattr(parts[part_index(shard)], name)
        if tensor.shape != loaded.shape:
            raise CheckpointError(
                f"tensor {name!r} must have shape {tuple(tensor.shape)}, got {tuple(loaded.shape)}"
            )
        tensor.copy_(loaded)

    return load
