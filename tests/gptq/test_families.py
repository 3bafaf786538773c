"""Every family is found by structure, quantized, saved, and loaded again by transformers."""

from __future__ import annotations

import pytest
import rlo_gptq
import torch
import transformers
from rlo_gptq.models.layout import UnsupportedModelError, find_layout, split_all_experts
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.settings import LayerSettings

LAYERS = {
    "llama": 7,
    "llama-gqa-tied": 7,
    "opt": 6,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3": 7,
    "phi": 6,
    "phi3": 4,
    "gpt-neox": 4,
    "mixtral": 10,
    "qwen3-moe": 12,
}
IDS = torch.arange(2, 34)[None]


def logits_with_dense_weights(original, loaded) -> torch.Tensor:
    """The original model in which every quantized layer has its dequantised weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    split_all_experts(model)
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())
    return model(IDS).logits


@pytest.mark.parametrize("family", LAYERS)
@torch.no_grad()
def test_a_family_round_trips_with_the_logits_of_its_dequantised_weights(
    family, model_folder, text_file, quantize_to, tmp_path
):
    folder = model_folder(family)
    layer = LayerSettings(bits=4, method="gptq", incoherence="hadamard", rescale=True)
    result = quantize_to(folder, text_file, tmp_path / "q", layer)
    assert len(result.records) == 2 * LAYERS[family]
    assert all(record["proxy"] < 0.05 for record in result.records if record["tokens"])
    loaded = rlo_gptq.load(tmp_path / "q")
    found = sum(isinstance(module, QuantLinear) for module in loaded.modules())
    assert found == len(result.records)
    expected = logits_with_dense_weights(folder, loaded)
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@torch.no_grad()
def test_split_experts_compute_what_the_fused_ones_do(family, model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(family)).eval()
    fused = model(IDS).logits
    assert split_all_experts(model)
    torch.testing.assert_close(model(IDS).logits, fused, atol=1e-5, rtol=1e-5)


def test_routers_of_experts_stay_as_they_are(model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("mixtral"))
    split_all_experts(model)
    assert not [name for name in find_layout(model).names() if name.endswith("gate")]


def test_layers_that_are_skipped_stay_as_they_are(model_folder, text_file, quantize_to, tmp_path):
    folder = model_folder("llama-gqa-tied")
    quantize_to(folder, text_file, tmp_path / "q", skip=("*.0.mlp.*", "*.v_proj"))
    layers = rlo_gptq.load(tmp_path / "q").model.layers
    assert not isinstance(layers[0].mlp.up_proj, QuantLinear)
    assert isinstance(layers[1].mlp.up_proj, QuantLinear)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers
    assert torch.equal(layers[0].mlp.up_proj.weight, original[0].mlp.up_proj.weight)
    assert torch.equal(layers[1].self_attn.v_proj.weight, original[1].self_attn.v_proj.weight)


def test_a_model_without_linear_layers_is_refused_with_what_was_found():
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)
    model = transformers.AutoModelForCausalLM.from_config(config)
    message = (
        r"model must have a list of decoder blocks made of nn.Linear, got GPT2LMHeadModel "
        r"\(model type 'gpt2'\) with 8 Conv1D, 5 LayerNorm, 2 Embedding, 1 Linear"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        find_layout(model)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(
        num_layers=1, d_model=8, d_ff=8, d_kv=4, num_heads=2, vocab_size=20
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="model must be a decoder, got T5ForCond"):
        find_layout(model)


def test_skipping_everything_is_refused(model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with pytest.raises(UnsupportedModelError, match="nothing is left to quantize in LlamaForC"):
        find_layout(model, skip=("*",))


def test_a_pattern_that_no_layer_has_is_refused_with_the_names_there_are(model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    message = r"no layer of LlamaForCausalLM .* named '\*.down', as --skip says; .* mlp.down_proj,"
    with pytest.raises(UnsupportedModelError, match=message):
        find_layout(model, skip=("*.up_proj", "*.down"))


def test_experts_that_are_all_skipped_stay_as_the_checkpoint_had_them(
    model_folder, text_file, quantize_to, tmp_path
):
    """Split, they would have names that the loaded model does not ask for."""
    source = model_folder("mixtral")
    layout = quantize_to(source, text_file, tmp_path / "q", skip=("*.experts.*",)).layout
    assert not layout.experts
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    loaded = rlo_gptq.load(tmp_path / "q")
    assert torch.equal(loaded.get_parameter(experts), original.get_parameter(experts))
    some = quantize_to(source, text_file, tmp_path / "s", skip=("*.layers.0.mlp.experts.*",))
    assert some.layout.experts
    rlo_gptq.load(tmp_path / "s")
