"""Layers of different widths in one model: rules, sizes, loading, tuning, other formats."""

from __future__ import annotations

import json
import warnings

import pytest
import rlo_gptq
import torch
import transformers
from rlo_gptq.adapters.merge import quantize_options
from rlo_gptq.bit_rules import BitRuleError, apply_rules, described, matches, parse_rules
from rlo_gptq.evaluation.inspect_layers import inspect_model
from rlo_gptq.formats.export import export_checkpoint
from rlo_gptq.formats.gptq import FormatError
from rlo_gptq.models.source import ModelSource
from rlo_gptq.options import Options
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.plan import discover
from rlo_gptq.settings import EndToEndSettings, LayerSettings
from rlo_gptq.tuning.run import Tuning, run_tuning
from safetensors.torch import load_file

IDS = torch.arange(20)[None]
LAYER = LayerSettings(bits=3, method="gptq", incoherence="hadamard", rescale=True)
RULES = (("mlp.down_proj", 6), ("layers.0", 2), ("layers.0.self_attn.v_proj", 5))


def test_rules_are_read_from_text_from_several_and_from_a_mapping():
    expected = (("mlp.down_proj", 4), ("layers.0", 8))
    assert parse_rules("mlp.down_proj=4, layers.0=8") == expected
    assert parse_rules(["mlp.down_proj=4", "layers.0=8"]) == expected
    assert parse_rules({"mlp.down_proj": 4, "layers.0": 8}) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "down_proj",
            "--bits must be made of NAME=BITS, e.g. mlp.down_proj=4,layers.0=6, got 'down_proj'",
        ),
        (
            "down_proj=7",
            "--bits of 'down_proj' must be one of 2, 3, 4, 5, 6, 8, got 7; --skip leaves layers "
            "as they are",
        ),
        (
            "down_proj=four",
            "--bits of 'down_proj' must be one of 2, 3, 4, 5, 6, 8, got 'four'; --skip leaves "
            "layers as they are",
        ),
    ],
)
def test_what_is_no_rule_is_refused(text, message):
    with pytest.raises(BitRuleError) as caught:
        parse_rules(text)
    assert str(caught.value) == message


def test_a_pattern_is_a_run_of_whole_parts_of_a_name():
    name = "model.layers.1.mlp.experts.12.down_proj"
    for pattern in ("down_proj", "layers.1", "experts.*.down_proj", "*.down_proj", name):
        assert matches(name, pattern), pattern
    for pattern in ("down", "layers", "layers.12", "mlp.down_proj", "ayers.1"):
        assert matches(name, pattern) == (pattern == "layers"), pattern


def test_of_two_rules_the_later_wins_and_a_rule_for_nothing_is_refused():
    names = [f"model.layers.{i}.mlp.{kind}" for i in (0, 1) for kind in ("up_proj", "down_proj")]
    rules = (("down_proj", 4), ("layers.0", 2), ("layers.1.mlp.up_proj", 3))
    assert apply_rules(names, rules, 3) == {
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 4,
    }
    with pytest.raises(BitRuleError) as caught:
        apply_rules(names, (("embed_tokens", 4),), 3)
    assert str(caught.value) == (
        "no layer that is quantized is named 'embed_tokens', as --bits says; there are "
        "mlp.down_proj, mlp.up_proj; embedding and head have --embed-bits and --head-bits"
    )


def test_layers_of_more_bits_than_a_trellis_has_get_a_scalar_grid():
    trellis = LayerSettings(bits=2, grid="trellis", incoherence="hadamard")
    assert trellis.with_bits(6).grid == "scalar"
    assert trellis.with_bits(4).grid == "trellis"
    assert trellis.with_bits(2) == trellis
    assert described([2, 4, 4, 4]) == "3.5 (mixed: 2, 4)"


@pytest.fixture(scope="module")
def mixed(model_folder, text_file, quantize_to, tmp_path_factory):
    """A small Llama of 2 to 6 bits; not to be changed."""
    out = tmp_path_factory.mktemp("mixed") / "model"
    quantize_to(
        model_folder("llama-gqa-tied"), text_file, out, LAYER, bits=RULES, embed_bits=8, head_bits=8
    )
    return out


def expected_bits(name):
    if name.endswith("layers.0.self_attn.v_proj"):
        return 5
    if ".layers.0." in name:
        return 2
    return 6 if name.endswith("mlp.down_proj") else 3


def test_each_layer_is_stored_and_loaded_with_its_own_bits(mixed):
    model = rlo_gptq.load(mixed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {n: m.bits for n, m in layers.items()} == {n: expected_bits(n) for n in layers}
    inspected = {
        r["layer"]: r["bits"] for r in inspect_model(str(mixed))["layers"] if "mlp" in r["layer"]
    }
    assert inspected == {n: expected_bits(n) for n in inspected}
    assert "mixed: 2, 3, 5, 6" in inspect_model(str(mixed))["bits"]
    assert "mixed: 2, 3, 5, 6" in (mixed / "README.md").read_text()


def test_layers_of_a_width_are_those_of_a_model_of_that_width(
    mixed, model_folder, text_file, quantize_to, tmp_path
):
    """Only true of the first layers, which see nothing quantized before them."""
    options = {"embed_bits": 8, "head_bits": 8}
    model = model_folder("llama-gqa-tied")
    quantize_to(model, text_file, tmp_path / "q", LAYER.with_bits(2), **options)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (mixed, tmp_path / "q"))
    for kind in ("q_proj", "k_proj"):
        for part in ("weight", "scales"):
            name = f"model.layers.0.self_attn.{kind}.{part}"
            assert torch.equal(ours[name], theirs[name])


def test_the_planned_size_of_mixed_bits_is_that_of_the_file_to_the_byte(mixed, model_folder):
    source = ModelSource(model_folder("llama-gqa-tied"))
    chosen = {"nsamples": 4, "seqlen": 32, "embed_bits": 8, "head_bits": 8, "bits": RULES}
    plan = discover(source, Options("m", "t", LAYER, **chosen))
    source.close()
    size = (mixed / "model.safetensors").stat().st_size
    assert plan.summary["checkpoint_bytes"] == size == inspect_model(str(mixed))["file_bytes"]
    assert plan.summary["bits"].startswith("2: ")


def test_a_run_with_mixed_bits_goes_on_where_it_was_stopped(
    mixed, model_folder, text_file, quantize_to, silent, tmp_path
):
    def stop(record):
        if "layers.1" in record["layer"]:
            raise KeyboardInterrupt

    silent.layer = stop
    options = {"bits": RULES, "embed_bits": 8, "head_bits": 8}
    model = model_folder("llama-gqa-tied")
    with pytest.raises(KeyboardInterrupt):
        quantize_to(model, text_file, tmp_path / "q", LAYER, progress=silent, **options)
    result = quantize_to(model, text_file, tmp_path / "q", LAYER, **options)
    assert result.resumed == 1
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (mixed, tmp_path / "q"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tuning_keeps_each_layers_bits(mixed, model_folder, text_file, tmp_path):
    settings = EndToEndSettings(steps=2, nsamples=4, seqlen=16, evaluations=1)
    original = str(model_folder("llama-gqa-tied"))
    tuning = Tuning(mixed, str(text_file), settings, original=original)
    run_tuning(tuning, tmp_path / "q", progress=False)
    before, after = (rlo_gptq.load(folder) for folder in (mixed, tmp_path / "q"))
    layers = {n: m for n, m in before.named_modules() if isinstance(m, QuantLinear)}
    for name, layer in layers.items():
        tuned = after.get_submodule(name)
        assert tuned.bits == layer.bits
        assert torch.equal(tuned.weight, layer.weight)


def test_merging_quantizes_again_with_each_layers_bits(mixed):
    options = quantize_options(mixed, "text", changes={}, tune=None)
    bits = dict(options.bits)
    assert bits["model.layers.1.mlp.down_proj"] == 6
    assert bits["model.layers.0.self_attn.v_proj"] == 5
    assert "model.layers.1.mlp.up_proj" not in bits  # those are the settings' own
    assert (options.embed_bits, options.head_bits) == (8, 8)


@pytest.fixture(scope="module")
def exportable(model_folder, text_file, quantize_to, tmp_path_factory):
    """Widths that other formats take: 2, 4 and 8 bits, integer zeros; not to be changed."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "m")
    transformers.AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder / "m")
    layer = LayerSettings(bits=4, method="nearest", integer_zero=True, group_size=32)
    rules = (("down_proj", 8), ("layers.1.self_attn.*", 8))
    quantize_to(folder / "m", text_file, folder / "q", layer, bits=rules)
    return folder / "q"


def test_compressed_tensors_gives_the_same_logits_with_mixed_bits(exportable, tmp_path):
    pytest.importorskip("compressed_tensors")
    export_checkpoint(exportable, tmp_path / "out", format="compressed-tensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
    ours = rlo_gptq.load(exportable, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-4)


def test_the_gptq_format_is_refused_mixed_bits(exportable, tmp_path):
    with pytest.raises(FormatError) as caught:
        export_checkpoint(exportable, tmp_path / "out", format="gptq")
    assert str(caught.value) == (
        "layers must share one number of bits in the GPTQ format, got 4 and 8 (layer "
        "'0.mlp.down_proj'); export to compressed-tensors, or quantize without --bits, --bytes "
        "and --average-bits"
    )
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_has_a_type_for_each_layers_bits(exportable, tmp_path):
    gguf = pytest.importorskip("gguf")
    export_checkpoint(exportable, tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_a_gguf_type_takes_no_rules(model_folder):
    source = ModelSource(model_folder("llama"))
    options = Options("m", "t", LAYER, nsamples=4, seqlen=32, gguf="Q4_0", bits=RULES)
    with pytest.raises(BitRuleError, match="--bits takes no --format gguf: its --type decides"):
        discover(source, options)
    source.close()
