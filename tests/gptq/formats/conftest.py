from pathlib import Path

import pytest
import torch
from rlo_core.files import write_json
from rlo_gptq.formats.gptq import GridLayer
from rlo_gptq.models.shards import save_tensors
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def make_layer():
    """A random layer, 64 outputs and 96 inputs; `zero=None` gives each group its own zero."""

    def make(bits: int, zero: float | None = None, group_size: int = 32) -> GridLayer:
        groups = 96 // group_size
        codes = torch.randint(0, 1 << bits, (64, 96), dtype=torch.uint8)
        zeros = (
            torch.randint(0, 1 << bits, (64, groups)).float()
            if zero is None
            else torch.full((64, groups), zero)
        )
        scales = (torch.rand(64, groups) + 0.01).half().float()
        return GridLayer(codes, scales, zeros, torch.arange(96) // group_size, bits)

    return make


@pytest.fixture
def make_checkpoint(tmp_path):
    """A tiny Llama rounded to the nearest and written in our format; returns its folder."""

    def make(
        *, skip: tuple[str, ...] = (), hidden: int = 64, intermediate: int = 96, **settings
    ) -> Path:
        chosen = LayerSettings(method="nearest", **{"integer_zero": True, **settings})
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=intermediate,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        state = dict(model.state_dict())
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        names = tuple(name for name in names if name.rpartition(".")[2] not in skip)
        for index in range(2):
            for name in names:
                full = f"model.layers.{index}.{name}"
                weight = state.pop(f"{full}.weight")
                layer = quantize_layer(weight, torch.eye(weight.shape[1]), chosen, seed=0)
                packed = QuantLinear.from_layer(layer, chosen)
                state.update({f"{full}.{key}": t for key, t in packed.state_dict().items()})
        folder = tmp_path / "ours"
        folder.mkdir()
        save_tensors(folder / "model.safetensors", state)
        quantization = {
            "quant_method": "rlo-gptq",
            "version": 1,
            "settings": chosen.to_dict(),
            "blocks": "model.layers",
            "modules": dict.fromkeys(names),
            "split_experts": False,
        }
        document = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        write_json(folder / "config.json", {**document, "quantization_config": quantization})
        return folder

    return make
