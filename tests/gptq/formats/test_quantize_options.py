"""What the formats, folded rotations and weighted Hessians add to `rlo-gptq quantize`."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from rlo_gptq.cli.main import main
from rlo_gptq.demo import byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def tiny(tmp_path):
    """A tiny Llama with a byte tokenizer, and a text."""
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    words = torch.randint(0, 1000, (400,)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"word{word}" for word in words))
    return tmp_path


def quantize(tiny, name: str, *options: str):
    arguments = [
        "quantize",
        str(tiny / "model"),
        str(tiny / "text.txt"),
        "--save",
        str(tiny / name),
    ]
    arguments += ["--nsamples", "4", "--seqlen", "32", "--wbits", "4", "--quant", "gptq", "--json"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_folded_rotations_export_to_both_formats_in_one_run_and_are_verified(tiny) -> None:
    pytest.importorskip("compressed_tensors")
    result = quantize(
        tiny, "out", "--rotate", "fold", "--groupsize", "32", "--format", "gptq",
        "--format", "compressed-tensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    exports = json.loads(result.stdout)["exports"]
    assert [e["format"] for e in exports] == ["gptq", "compressed-tensors"]
    names = sorted(path.name for path in tiny.iterdir())
    assert names == ["model", "out", "out-compressed-tensors", "out-gptq", "text.txt"]
    again = quantize(
        tiny, "out", "--rotate", "fold", "--groupsize", "32", "--format", "compressed-tensors",
        "--verify-with", "transformers",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["exports"][0]["verified"][0]["difference"] < 1e-5


def test_a_weighted_hessian_changes_the_codes_and_cross_entropys_does_not(tiny) -> None:
    for name, hessian in (("plain", "plain"), ("ce", "ce"), ("rlo", "rlo:k=0.3")):
        result = quantize(tiny, name, "--hessian", hessian)
        assert result.exit_code == 0, result.output
    plain, ce, rlo = (load_file(tiny / n / "model.safetensors") for n in ("plain", "ce", "rlo"))
    weights = [key for key in plain if key.endswith("down_proj.weight")]
    assert all(torch.equal(plain[key], ce[key]) for key in plain)
    assert any(not torch.equal(plain[key], rlo[key]) for key in weights)


def test_gradient_energy_weights_too(tiny) -> None:
    result = quantize(tiny, "energy", "--hessian", "rlo:k=5", "--hessian-energy")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gptq", "--incoh-processing"], "--format takes no rotation at run time; use"),
        (["--verify-with", "transformers"], "--verify-with needs --format"),
        (["--hessian-energy"], "--hessian-energy needs --hessian SPEC"),
        (["--format", "gptq", "--grid", "trellis"], "--format takes --grid scalar, got trellis"),
        (["--format", "gptq", "--compat", "quip"], "integer zeros: with --compat quip, --qfn a"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tiny, options, message) -> None:
    result = quantize(tiny, "out", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_an_unknown_loss_is_refused_before_anything_is_written(tiny) -> None:
    result = quantize(tiny, "out", "--hessian", "rol")
    assert result.exit_code == 1
    assert "unknown loss 'rol'; did you mean 'rlo'?" in result.output
    assert not (tiny / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groupsize", "48"], "'model.layers.0.self_attn.q_proj': its input width must be a mul"),
        (["--skip", "model.layers.0.mlp.*"], "layers must be quantized in all blocks or in none"),
        (["--tune", "--nsamples", "1"], "tuning needs at least 2 calibration sequences"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_quantized(
    tiny, options, message
) -> None:
    result = quantize(tiny, "out", "--format", "gptq", "--rotate", "fold", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert sorted(path.name for path in tiny.iterdir()) == ["model", "text.txt"]


def test_the_export_of_another_model_is_not_taken_for_this_ones(tiny) -> None:
    """A user deletes the model, and quantizes again by other settings under the same name."""
    assert quantize(tiny, "out", "--format", "gptq").exit_code == 0
    assert quantize(tiny, "out", "--format", "gptq").exit_code == 0
    shutil.rmtree(tiny / "out")
    result = quantize(tiny, "out", "--format", "gptq", "--percdamp", "0.1")
    assert result.exit_code == 1
    assert "out-gptq' must be a new or empty folder; nothing is overwritten" in result.stderr
