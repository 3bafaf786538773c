"""Runs where vLLM is installed; it needs a torch of its own, so that is an environment apart."""

import pytest
import torch
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings

pytest.importorskip("vllm")


def packed(rows: int, settings: LayerSettings, seed: int) -> QuantLinear:
    layer = quantize_layer(torch.randn(rows, 64), torch.eye(64), settings, seed=seed)
    return QuantLinear.from_layer(layer, settings)


@pytest.fixture
def settings() -> LayerSettings:
    return LayerSettings(bits=2, method="nearest", incoherence="hadamard", rescale=True)


def config(settings: LayerSettings):
    from rlo_gptq.vllm_plugin import register
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    document = {
        "quant_method": "rlo-gptq",
        "settings": settings.to_dict(),
        "blocks": "model.layers",
        "modules": {"self_attn.q_proj": None, "self_attn.k_proj": None, "mlp.down_proj": [1]},
    }
    return get_quantization_config("rlo-gptq").from_config(document)


def test_a_joined_layer_gives_the_outputs_of_its_parts(settings) -> None:
    from rlo_gptq.checkpoint.vllm_linear import PackedLinearMethod

    assert config(settings).settings == settings
    parts = [packed(32, settings, 1), packed(16, settings, 2), packed(16, settings, 3)]
    layer, method = torch.nn.Module(), PackedLinearMethod(settings)
    method.create_weights(layer, 64, [32, 16, 16], 64, 64, torch.float32)
    for shard, part in zip("qkv", parts, strict=True):
        for name, tensor in part.state_dict().items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    x, bias = torch.randn(5, 64), torch.randn(64)
    expected = torch.cat([x @ part.dequantize().T for part in parts], -1) + bias
    assert torch.allclose(method.apply(layer, x, bias), expected, atol=1e-4)


def test_a_layer_is_recognised_by_the_parts_that_vllm_joins(settings) -> None:
    from rlo_gptq.checkpoint.validation import CheckpointError
    from rlo_gptq.checkpoint.vllm_linear import quantized_parts

    modules = config(settings).modules
    joined = {"qk_proj": ["q_proj", "k_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert quantized_parts("model.layers.0.self_attn.qk_proj", "model.layers", modules, joined)
    assert quantized_parts("model.layers.1.mlp.down_proj", "model.layers", modules, joined)
    assert not quantized_parts("model.layers.0.mlp.down_proj", "model.layers", modules, joined)
    assert not quantized_parts("lm_head", "model.layers", modules, joined)
    with pytest.raises(CheckpointError, match="must be quantized in all of its parts"):
        quantized_parts("model.layers.0.self_attn.qkv_proj", "model.layers", modules, joined)


def test_tensor_parallel_is_refused(settings) -> None:
    from rlo_gptq.checkpoint.vllm_linear import PackedLinearMethod

    with pytest.raises(ValueError, match="tensor_parallel_size must be 1 for rlo-gptq"):
        PackedLinearMethod(settings).create_weights(
            torch.nn.Module(), 32, [64], 64, 64, torch.float32
        )


def test_the_plugin_is_found_by_vllm() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert "rlo-gptq" in QUANTIZATION_METHODS
