"""GGUF files of whole models, read back by transformers and by the package gguf."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from rlo_gptq.cli.main import main
from rlo_gptq.formats.gguf.architecture import (
    ARCHITECTURES,
    architecture_of,
    hyperparameters,
    rope_factors,
    rows_of,
)
from rlo_gptq.formats.gguf.finish import file_name, write_dense
from rlo_gptq.formats.gguf.tokenizer import tokenizer_metadata
from rlo_gptq.formats.gguf.types import GGUFError
from rlo_gptq.models.source import ModelSource
from rlo_gptq.packed.quant_linear import QuantLinear

gguf = pytest.importorskip("gguf")

WIDE = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def made(kind: str, folder: Path, **changed: Any) -> Path:
    from rlo_gptq.demo import byte_tokenizer

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**WIDE, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            elif "norm" in name:
                parameter.add_(torch.rand_like(parameter) / 2)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    # The format's byte-level BPE needs one merge at least.
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["ab"] = 260
    document["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("LlamaConfig", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words: str, ok: bool = True) -> Any:
    result = CliRunner().invoke(main, list(words))
    assert (result.exit_code == 0) == ok, result.output
    return result


def quantize(model: Path, text: Path, out: Path, *words: str) -> Any:
    sizes = ("--nsamples", "4", "--seqlen", "32", "--json")
    command = ("quantize", str(model), str(text), "--format", "gguf", "--save", str(out))
    return json.loads(run(*command, *sizes, *words).stdout)


@pytest.mark.parametrize(
    "kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "Gemma2Config", "Gemma3TextConfig"]
)
def test_a_dense_file_is_the_model_for_transformers(kind: str, tmp_path: Path) -> None:
    tied: dict[str, Any] = {"tie_word_embeddings": True} if kind.startswith("Gemma") else {}
    # transformers reads no head size from such files, but takes Qwen3's own.
    size = {"head_dim": 128} if kind == "Qwen3Config" else {}
    if kind.startswith("Gemma"):
        size = {"head_dim": 256}  # its default, as query_pre_attn_scalar's is
    folder = made(kind, tmp_path / "model", **tied, **size)
    source = ModelSource(folder)
    write_dense(source, tmp_path / "dense" / "model.gguf", kind="F32", base="model")
    ids = torch.arange(40).remainder(250)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", gguf_file="model.gguf", dtype=torch.float32
        )(ids).logits
    assert (again - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_quantized_file_has_the_type_the_metadata_and_the_weights_of_the_run(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    document = quantize(llama, text, tmp_path / "out", "--type", "q4_0")
    path = tmp_path / "out" / "tiny-llama-Q4_0.gguf"
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 2
    assert fields["llama.attention.head_count_kv"] == 1
    assert fields["tokenizer.ggml.bos_token_id"] == 257
    assert fields["tokenizer.chat_template"].startswith("{% for m in messages %}")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert document["bytes"] == path.stat().st_size
    assert document["bits_per_weight"] == 4.5
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for name, weight in dense.state_dict().items():
        error = (model.state_dict()[name] - weight).norm() / weight.norm()
        assert error < (0.2 if weight.ndim > 1 else 1e-6), name


def test_a_run_that_is_complete_is_left_as_it_is(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(llama, text, tmp_path / "out", "--type", "IQ4_NL")
    again = quantize(llama, text, tmp_path / "out", "--type", "IQ4_NL")
    assert again["already_done"]


def test_a_gguf_file_can_be_the_source_and_its_tokenizer_is_copied(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "in" / "thing.F32.gguf"
    write_dense(ModelSource(llama), path, kind="F32", base="thing")
    # What transformers cannot say of this tokenizer stays, for it comes from the file.
    quantize(path, text, tmp_path / "out", "--type", "Q5_1")
    made_ = gguf.GGUFReader(tmp_path / "out" / "thing-Q5_1.gguf")
    before = gguf.GGUFReader(path)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "llama.rope.freq_base"):
        assert made_.fields[key].contents() == before.fields[key].contents()
    assert made_.fields["general.file_type"].contents() == 9


def test_folded_rotations_are_in_the_file(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(llama, text, tmp_path / "out", "--type", "Q8_0", "--rotate", "fold")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="tiny-llama-Q8_0.gguf", dtype=torch.float32
    )
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    first = "model.layers.0.mlp.gate_proj.weight"
    assert (model.state_dict()[first] - dense.state_dict()[first]).norm() > 1
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = dense(ids).logits, model(ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--type", "Q9"], "unknown GGUF type 'Q9'"),
        (["--wbits", "4"], "--type decides the grid of a GGUF file; leave out --wbits"),
        (["--groupsize", "32"], "leave out --groupsize"),
        (["--incoh-processing"], "use --rotate fold instead of"),
        (["--tune"], "--format gguf takes no --tune"),
        (["--format", "gptq"], "make the other formats in another run"),
        (["--verify-with", "transformers"], "scripts/verify_gguf.py runs it in llama.cpp"),
    ],
)
def test_options_that_a_gguf_file_cannot_follow_are_usage_errors(
    llama: Path, text: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(llama), str(text), "--format", "gguf", "--save", str(out), *words]
    result = run(*command, ok=False)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert not out.exists()


def test_type_needs_the_format(llama: Path, text: Path, tmp_path: Path) -> None:
    command = ["quantize", str(llama), str(text), "--type", "Q4_0", "--save", str(tmp_path / "o")]
    assert "--type needs --format gguf" in run(*command, ok=False).output


def test_opt_is_refused_with_the_reason_before_anything_is_written(
    model_folder: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(model_folder("opt")), str(text), "--format", "gguf"]
    result = run(*command, "--seqlen", "32", "--nsamples", "2", "--save", str(out), ok=False)
    assert result.exit_code == 1
    assert "llama.cpp has no architecture for OPT (learned positions" in result.output
    assert not out.exists()


def test_widths_that_no_block_divides_are_refused_together(
    model_folder: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(model_folder("llama")), str(text), "--format", "gguf"]
    words = ["--seqlen", "32", "--nsamples", "2", "--save", str(tmp_path / "out")]
    output = run(*command, *words, ok=False).output
    assert "no layer's width is a multiple of 32" in output
    assert "24, 44" in output


def test_heads_are_interleaved_for_llama_and_only_there() -> None:
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8}
    rows = rows_of(ARCHITECTURES["llama"], "model.layers.0.self_attn.q_proj.weight", config)
    assert rows is not None
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    name = "model.layers.0.self_attn.k_proj.weight"
    assert rows_of(ARCHITECTURES["qwen2"], name, config) is None


def test_llama_3_s_divisors_are_those_that_transformers_computes() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=65536, rope_parameters=rope
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config.to_dict())
    assert factors is not None
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / factors, expected, rtol=1e-4)


def test_a_sliding_window_bounds_the_context_where_llama_cpp_has_none() -> None:
    config = transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768)
    found = hyperparameters(config.to_dict())
    assert found["context_length"] == ("uint32", 4096)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "falcon"}, "--format gguf takes model types llama, mistral"),
        ({"hidden_act": "relu"}, "llama.cpp's llama has the activation 'silu', got 'relu'"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type must be default, linear, llama3 or yarn",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(GGUFError, match=message):
        architecture_of({**transformers.LlamaConfig().to_dict(), **changed})


def test_a_scale_of_attention_that_llama_cpp_does_not_compute_is_refused() -> None:
    config = transformers.Gemma2Config(head_dim=16, query_pre_attn_scalar=256).to_dict()
    with pytest.raises(GGUFError, match="root of 16, and this model's query_pre_attn_scalar is"):
        architecture_of(config)


def test_the_splitting_of_text_is_named_or_refused(llama: Path, tmp_path: Path) -> None:
    found = tokenizer_metadata(llama, 261)
    assert found["tokenizer.ggml.model"] == ("string", "gpt2")
    assert found["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert len(found["tokenizer.ggml.tokens"][1]) == 261
    document = json.loads((llama / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    for file in llama.iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(GGUFError, match=r"no name for the way .* splits text \(Whitespace\)"):
        tokenizer_metadata(tmp_path, 261)


def test_the_type_of_the_source_leaves_its_name() -> None:
    assert file_name("models/Tiny-1B.Q4_1.gguf", "Q5_0") == "Tiny-1B-Q5_0.gguf"
    assert file_name("org/Tiny-1B", "Q4_K_M") == "Tiny-1B-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--wbits", "4", "--integer-zero", "--groupsize", "32"], "Q4_0"),
        (["--wbits", "4", "--asym", "--integer-zero"], "Q4_1"),
        (["--wbits", "8", "--integer-zero"], "Q8_0"),
    ],
)
def test_an_export_holds_the_checkpoint_s_own_codes(
    llama: Path, text: Path, tmp_path: Path, words: list[str], kind: str
) -> None:
    import rlo_gptq

    out, folder = tmp_path / "ours", tmp_path / "gguf"
    sizes = ["--nsamples", "2", "--seqlen", "32", "--save", str(out)]
    sizes += ["--embed-bits", "32", "--head-bits", "32"]  # rounded once, by the export
    run("quantize", str(llama), str(text), *words, *sizes)
    run("export", str(out), "--format", "gguf", "--out", str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=f"ours-{kind}.gguf", dtype=torch.float32
    )
    ours = rlo_gptq.load(out)
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            expected = module.dequantize()
            found = model.get_submodule(name).weight
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wbits", "2", "--integer-zero"], "hold 4, 5 or 8 bits, got 2 bits; quantize the model"),
        (["--wbits", "4", "--integer-zero", "--groupsize", "16"], "whole blocks of 32 columns"),
        (["--wbits", "4", "--integer-zero", "--scale-dtype", "float32"], "scales must be float16"),
    ],
)
def test_an_export_that_would_have_to_round_again_is_refused(
    llama: Path, text: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out, folder = tmp_path / "ours", tmp_path / "gguf"
    sizes = ["--nsamples", "2", "--seqlen", "32", "--save", str(out)]
    run("quantize", str(llama), str(text), *words, *sizes)
    result = run("export", str(out), "--format", "gguf", "--out", str(folder), ok=False)
    assert message in result.output
    assert not folder.exists()


@pytest.mark.parametrize("rotate", [(), ("--rotate", "fold")])
@pytest.mark.parametrize(("kind", "tied"), [("Q4_0", True), ("Q4_K_M", False)])
def test_a_dry_run_names_the_size_of_the_gguf_file_to_the_byte(tmp_path, text, kind, tied, rotate):
    model = made("LlamaConfig", tmp_path / "some-llama", tie_word_embeddings=tied)
    out = tmp_path / "out"
    words = ("--type", kind, "--quant", "nearest", "--skip", "*.0.mlp.up_proj", *rotate)
    planned = quantize(model, text, out, *words, "--dry-run")
    assert not out.exists()
    quantize(model, text, out, *words)
    assert planned["gguf_bytes"] == (out / f"some-llama-{kind}.gguf").stat().st_size
    assert "checkpoint_bytes" not in planned
    reader = gguf.GGUFReader(out / f"some-llama-{kind}.gguf")
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    expected = ", ".join(f"{kinds.count(k)} x {k}" for k in sorted(set(kinds)))
    assert planned["types"] == expected


def test_the_planned_size_of_a_gguf_source_counts_its_copied_metadata(llama, tmp_path, text):
    (tmp_path / "in").mkdir()
    source = ModelSource(llama)
    path = tmp_path / "in" / "thing.F32.gguf"
    write_dense(source, path, kind="F32", base="thing")
    source.close()
    words = ("--type", "Q5_1", "--quant", "nearest")
    planned = quantize(path, text, tmp_path / "out", *words, "--dry-run")
    quantize(path, text, tmp_path / "out", *words)
    assert planned["gguf_bytes"] == (tmp_path / "out" / "thing-Q5_1.gguf").stat().st_size
