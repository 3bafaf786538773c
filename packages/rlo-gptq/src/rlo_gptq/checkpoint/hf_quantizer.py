"""What transformers needs to load the checkpoint: a quantization config and a quantizer,
registered.

`import rlo_gptq` sees to it that this module is imported once transformers' quantizers are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rlo_core.errors import RLOError
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlo_gptq.checkpoint.outside import (
    dense_outside,
    outside_modules,
    put,
    read_settings,
    submodule,
    swap_outside,
    with_settings,
)
from rlo_gptq.checkpoint.validation import (
    CheckpointError,
    check_files,
    check_parameters,
    check_values,
    require,
    require_finite,
)
from rlo_gptq.models.layout import split_all_experts
from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "rlo-gptq"
VERSION = 2
READABLE = (1, 2)
"""1 has no `outside` and no `bits`."""
_MAX_BLOCKS = 100_000


@register_quantization_config(METHOD)
class RLOGPTQConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json.

    Args:
        settings: `LayerSettings.to_dict()` of all quantized layers.
        blocks: Path of the list of decoder blocks, e.g. "model.layers".
        modules: For each layer inside a block ("self_attn.q_proj") the numbers of the blocks where
            it is quantized, or None for all.
        outside: Modules outside of the blocks that are replaced, see `Outside.to_config`.
        bits: Bits of layers that do not have the settings' own, by names like "0.mlp.down_proj".
        version: Of the format.
        split_experts: Whether fused experts became lists of linear layers.
        permuted: Whether layers store their columns in an order of their own, see `QuantLinear`.
        quant_method: "rlo-gptq".

    Raises:
        CheckpointError: a field is missing, unknown or out of range.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        blocks: str,
        modules: Mapping[str, list[int] | None],
        *,
        version: int = VERSION,
        split_experts: bool = False,
        permuted: bool = False,
        outside: Mapping[str, Any] | None = None,
        bits: Mapping[str, int] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        require(
            version in READABLE,
            f"version must be at most {VERSION}, got {version!r}; update rlo-gptq",
        )
        require(isinstance(settings, Mapping), f"settings must be an object, got {settings!r}")
        require(isinstance(blocks, str), f"blocks must be a string, got {blocks!r}")
        require(isinstance(modules, Mapping), f"modules must be an object, got {modules!r}")
        for name, indices in modules.items():
            good = indices is None or (
                isinstance(indices, list)
                and all(type(i) is int and 0 <= i < _MAX_BLOCKS for i in indices)
            )
            require(good, f"modules[{name!r}] must be null or a list of block numbers")
        default = read_settings(settings)
        outside_modules({} if outside is None else outside)
        self.outside = dict(outside or {})
        bits = {} if bits is None else bits
        require(isinstance(bits, Mapping), f"bits must be an object, got {bits!r}")
        for name, number in bits.items():
            with_settings(default, number, f"bits[{name!r}]")
        self.bits = dict(bits)
        self.quant_method = cast("Any", quant_method)
        self.version = version
        self.settings = dict(settings)
        self.blocks = blocks
        self.modules = dict(modules)
        self.split_experts = bool(split_experts)
        self.permuted = bool(permuted)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build the config from config.json's object, refusing names that are not known."""
        known = {"settings", "blocks", "modules", "version", "split_experts", "permuted"}
        known |= {"quant_method", "outside", "bits"}
        unknown = sorted(set(config_dict) - known)
        require(not unknown, f"quantization_config has unknown fields {', '.join(unknown)}")
        missing = sorted({"settings", "blocks", "modules"} - set(config_dict))
        require(not missing, f"quantization_config lacks {', '.join(missing)}")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def layer_settings(self) -> LayerSettings:
        """The settings of the quantized layers."""
        return LayerSettings.from_dict(self.settings)


def module_table(linears: tuple[tuple[str, ...], ...]) -> dict[str, list[int] | None]:
    """Return `RLOGPTQConfig.modules` for the quantized layers of each block."""
    where: dict[str, list[int]] = {}
    for index, names in enumerate(linears):
        for name in names:
            where.setdefault(name, []).append(index)
    return {name: None if len(i) == len(linears) else i for name, i in where.items()}


def _find_blocks(model: PreTrainedModel, path: str) -> tuple[str, nn.ModuleList]:
    """Return the blocks: at `path`, or with the head model's prefix left out or put in front."""
    parts = path.split(".")
    candidates = [".".join(parts[start:]) for start in range(len(parts))]
    candidates += [f"{model.base_model_prefix}.{path}"]
    modules = dict(model.named_modules())
    for name in candidates:
        found = modules.get(name)
        if isinstance(found, nn.ModuleList):
            return name, found
    raise CheckpointError(f"model {type(model).__name__} has no decoder blocks at {path!r}")


def swap_linears(model: PreTrainedModel, config: RLOGPTQConfig, dtype: torch.dtype) -> list[str]:
    """Replace the linear layers that `config` names by empty `QuantLinear`s on the meta device.

    Returns:
        The full names of the replaced layers.

    Raises:
        CheckpointError: a named layer is not there, or is no linear layer.
    """
    default = config.layer_settings
    path, blocks = _find_blocks(model, config.blocks)
    replaced = []
    left = set(config.bits)
    for name, indices in config.modules.items():
        for index in range(len(blocks)) if indices is None else indices:
            full = f"{path}.{index}.{name}"
            linear = submodule(model, full, nn.Linear)
            left.discard(f"{index}.{name}")
            bits = config.bits.get(f"{index}.{name}", default.bits)
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                default.with_bits(bits),
                bias=linear.bias is not None,
                dtype=dtype,
                device="meta",
                permuted=config.permuted,
            )
            put(model, full, quantized)
            replaced.append(full)
    require(not left, f"bits names {min(left, default='')!r}, which is no quantized layer")
    return replaced


@register_quantizer(METHOD)
class RLOGPTQQuantizer(HfQuantizer):
    """Puts `QuantLinear`s into the empty model before weights are loaded, and checks them after."""

    requires_calibration = True
    quantization_config: RLOGPTQConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if self.quantization_config.split_experts:
            split_all_experts(model)
        kind = dtype or model.dtype
        swapped = swap_linears(model, self.quantization_config, kind)
        swapped += swap_outside(model, outside_modules(self.quantization_config.outside), kind)
        if checkpoint_files:
            check_files([Path(file) for file in checkpoint_files], model, swapped)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedWeight):
                check_values(name, module)
            elif isinstance(module, TiedHead) and module.gain is not None:
                require_finite(f"{name}.gain", module.gain)
        check_parameters(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained makes a string of config.dtype
        kind: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                put(model, name, module.to_linear(kind))
        dense_outside(model, kind)
        return model

    def is_serializable(self) -> bool:
        """Packed layers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it: the gradient goes through to the inputs."""
        return True


def as_error(error: Exception) -> RLOError:
    """Return transformers' failure to load as one line of ours."""
    return CheckpointError(" ".join(str(error).split())[:400])
