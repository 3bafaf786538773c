"""The checkpoint: loaded by transformers, loud without us, and closed to files that mean harm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rlo_gptq
import torch
import transformers
from rlo_gptq.checkpoint.card import model_card
from rlo_gptq.checkpoint.hf_quantizer import RLOGPTQConfig, module_table
from rlo_gptq.checkpoint.validation import CheckpointError
from rlo_gptq.models.digests import DIGESTS
from rlo_gptq.models.shards import ShardWriter
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.finish import write_weights
from rlo_gptq.settings import LayerSettings
from safetensors.torch import load_file, save_file

IDS = torch.arange(2, 34)[None]
NAME = "model.layers.1.mlp.down_proj"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)


def test_from_pretrained_and_load_give_the_same_model(quantized):
    with torch.no_grad():
        ours = rlo_gptq.load(quantized)(IDS).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(quantized)(IDS).logits
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["rlo_gptq", "transformers"])
def test_importing_the_package_before_or_after_transformers_is_enough(first, quantized):
    second = {"rlo_gptq": "transformers", "transformers": "rlo_gptq"}[first]
    code = (
        f"import {first}, {second}\n"
        f"from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(quantized)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = run_python(code)
    assert done.stdout.strip() == "QuantLinear", done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers():
    done = run_python("import sys, rlo_gptq; print([m for m in sys.modules if m[:5] == 'torch'])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "first", ["models.layout", "packed.quant_linear", "settings", "checkpoint.validation"]
)
def test_what_the_registered_quantizer_imports_does_not_import_transformers(first):
    """Else transformers' models, being imported, would ask for a half imported module of ours."""
    done = run_python(f"import sys, rlo_gptq.{first}; print('transformers' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("bits", [2, 8])
def test_without_the_package_the_packed_shapes_are_refused(
    bits, model_folder, text_file, quantize_to, tmp_path
):
    """What transformers does when the method is not registered: it goes on without a quantizer."""
    layer = LayerSettings(bits=bits, method="nearest")
    quantize_to(model_folder("llama"), text_file, tmp_path / "q", layer)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "a-method-nobody-knows"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


@pytest.mark.slow
def test_in_an_interpreter_without_the_package_loading_fails(quantized):
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(quantized)!r})"
    )
    done = run_python(code)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_saving_and_loading_again_gives_the_same_bits(quantized, tmp_path):
    model = rlo_gptq.load(quantized)
    model.save_pretrained(tmp_path)
    before, after = (
        load_file(quantized / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(rlo_gptq.load(tmp_path)(IDS).logits, model(IDS).logits)


def test_the_body_without_its_head_loads_too(quantized):
    body = transformers.AutoModel.from_pretrained(quantized)
    with torch.no_grad():
        expected = rlo_gptq.load(quantized).model(IDS).last_hidden_state
        assert torch.equal(body(IDS).last_hidden_state, expected)


def test_generate_works_and_a_device_map_is_taken(quantized):
    model = rlo_gptq.load(quantized, device_map={"": "cpu"})
    out = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=258)
    assert out.shape == (1, 9)


def test_weights_may_be_on_disk_while_other_blocks_run(quantized, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        quantized, device_map=places, offload_folder=tmp_path, offload_buffers=True
    )
    with torch.no_grad():
        expected = rlo_gptq.load(quantized)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected)


def test_dequantize_gives_an_ordinary_model_with_the_same_logits(quantized):
    model = rlo_gptq.load(quantized)
    with torch.no_grad():
        expected = model(IDS).logits
        dense = model.dequantize()
        assert not any(isinstance(module, QuantLinear) for module in dense.modules())
        torch.testing.assert_close(dense(IDS).logits, expected, atol=1e-3, rtol=1e-3)


def test_the_packed_part_is_as_small_as_its_bits(model_folder, text_file, quantize_to, tmp_path):
    layer = LayerSettings(bits=2, method="nearest")
    result = quantize_to(model_folder("llama"), text_file, tmp_path / "q", layer)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    packed = sum(tensors[f"{record['layer']}.weight"].numel() * 4 for record in result.records)
    weights = sum(record["rows"] * record["columns"] for record in result.records)
    assert packed <= weights / 4 * 1.35  # rows of 24 and 44 codes end inside a word


def test_a_large_model_is_sharded_by_block_with_an_index(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("rlo_gptq.models.shards.SINGLE_FILE_BYTES", 0)
    tensors = load_file(quantized / "model.safetensors")
    parts = []
    for part in ("rest", "0", "1"):
        chosen = {
            name: tensor
            for name, tensor in tensors.items()
            if (f"layers.{part}." in name if part != "rest" else "layers." not in name)
        }
        parts.append(tmp_path / f"part-{part}.safetensors")
        save_file(chosen, parts[-1], metadata={"format": "pt"})
    out = tmp_path / "sharded"
    out.mkdir()
    writer = ShardWriter(out)
    write_weights(parts, writer)
    writer.finish(json.loads((quantized / "config.json").read_text()), texts=quantized)
    assert (out / "model-00003-of-00003.safetensors").is_file()
    with torch.no_grad():
        assert torch.equal(rlo_gptq.load(out)(IDS).logits, rlo_gptq.load(quantized)(IDS).logits)


def test_the_model_card_says_how_to_load_and_names_no_path(quantized):
    card = (quantized / "README.md").read_text()
    assert "import rlo_gptq" in card
    assert "ignore_mismatched_sizes" in card
    assert str(quantized.parent) not in card + (quantized / "config.json").read_text()


def test_a_folder_is_not_named_as_a_model_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    about = {"dataset": "text.txt", "settings": LayerSettings(), "size": 1, "version": "1"}
    assert "base_model" not in model_card(base="models/mine", records=[], **about)
    assert "base_model: some/model\n" in model_card(base="some/model", records=[], **about)


def test_blocks_that_differ_are_listed_by_number():
    table = module_table((("a", "b"), ("a",), ("a", "b")))
    assert table == {"a": None, "b": [0, 2]}


def copy_of(folder: Path, out: Path) -> Path:
    """A copy as somebody else's program could have made it: without digests."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(DIGESTS))
    return out


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_to(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


HOSTILE = [
    (lambda t: t.pop(f"{NAME}.weight"), rf"the checkpoint lacks tensor '{NAME}.weight'"),
    (lambda t: t.pop(f"{NAME}.seed"), rf"the checkpoint lacks tensor '{NAME}.seed'"),
    (lambda t: t.pop("model.norm.weight"), r"the checkpoint lacks tensor 'model.norm.weight'"),
    (
        set_to(f"{NAME}.weight", torch.zeros(24, 44, dtype=torch.int32)),
        rf"tensor '{NAME}.weight' must have shape \(24, 5\), got \(24, 44\)",
    ),
    (
        set_to(f"{NAME}.weight", torch.zeros(24, 5)),
        rf"tensor '{NAME}.weight' must have type I32, got F32",
    ),
    (
        set_to(f"{NAME}.scales", torch.zeros(24, 1, dtype=torch.int64)),
        rf"tensor '{NAME}.scales' must have type F16, got I64",
    ),
    (
        set_to(f"{NAME}.scales", torch.full((24, 1), float("nan"), dtype=torch.float16)),
        rf"tensor '{NAME}.scales' must be finite, got NaN or inf",
    ),
    (
        lambda t: t[f"{NAME}.input_scale"].neg_(),
        rf"tensor '{NAME}.input_scale' must be positive",
    ),
    (
        lambda t: t[f"{NAME}.input_scale"].fill_(1e38),
        rf"tensor '{NAME}.input_scale' must give finite weights, got ",
    ),
    (
        set_to("model.norm.weight", torch.zeros(25)),
        r"tensor 'model.norm.weight' must have shape \(24,\), got \(25,\)",
    ),
]


OPENERS = [rlo_gptq.load, transformers.AutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
@pytest.mark.parametrize(
    "opener", [rlo_gptq.load, transformers.AutoModelForCausalLM.from_pretrained]
)
def test_a_changed_tensor_is_refused_by_name(opener, change, message, quantized, tmp_path):
    folder = copy_of(quantized, tmp_path / "bad")
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        opener(folder)


def test_a_truncated_file_is_refused(quantized, tmp_path):
    folder = copy_of(quantized, tmp_path / "bad")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="'model.safetensors' is not a whole safetensors"):
        rlo_gptq.load(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, quantized, tmp_path):
    folder = copy_of(quantized, tmp_path / "bad")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        rlo_gptq.load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("settings", {"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ("settings", {"group_size": -7}, "group_size must be -1, 0 or positive, got -7"),
        ("settings", {"bitz": 2}, "unknown setting 'bitz'"),
        ("settings", [], r"settings must be an object, got \[\]"),
        ("blocks", "os.path", "model LlamaForCausalLM has no decoder blocks at 'os.path'"),
        ("modules", {"mlp.nothing": None}, "model has no layer 'model.layers.0.mlp.nothing'"),
        ("modules", {"input_layernorm": None}, "must be nn.Linear, got LlamaRMSNorm"),
        ("modules", {"mlp.up_proj": [10**9]}, "must be null or a list of block numbers"),
        ("modules", {"mlp.up_proj": [7]}, "model has no layer 'model.layers.7.mlp.up_proj'"),
        ("version", 3, "version must be at most 2, got 3; update rlo-gptq"),
        ("extra", 1, "quantization_config has unknown fields extra"),
    ],
)
def test_a_changed_configuration_is_refused(field, value, message, quantized, tmp_path):
    folder = copy_of(quantized, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        rlo_gptq.load(folder)


def test_a_configuration_that_lacks_a_field_is_refused():
    with pytest.raises(CheckpointError, match="quantization_config lacks blocks, modules"):
        RLOGPTQConfig.from_dict({"quant_method": "rlo-gptq", "settings": {}})


def test_a_model_of_another_kind_is_refused(model_folder):
    with pytest.raises(CheckpointError, match="must be quantized by rlo-gptq, got None"):
        rlo_gptq.load(model_folder("llama"))
