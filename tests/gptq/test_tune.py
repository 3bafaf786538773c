"""Finetuned blocks come nearer to their dense output, never farther, and are stored as measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import rlo_gptq
import torch
import transformers
from click.testing import CliRunner
from rlo_gptq.calibration.hessian_sum import CalibrationError
from rlo_gptq.calibration.sequences import sample_sequences
from rlo_gptq.cli.main import main
from rlo_gptq.pipeline.tune import norm_names
from rlo_gptq.pipeline.work_folder import ResumeError
from rlo_gptq.settings import LayerSettings, TuneSettings
from safetensors.torch import load_file

FAMILY = "llama-gqa-tied"
LAYER = LayerSettings(bits=2, method="gptq", incoherence="hadamard", rescale=True)
TUNE = TuneSettings(epochs=2, learning_rate=0.02)
TRELLIS = LayerSettings(method="gptq", grid="trellis")


@pytest.fixture(scope="session")
def tuned(model_folder, text_file, quantize_to, tmp_path_factory):
    """A small Llama at 2 bits, finetuned block by block; the folder and what was measured."""
    out = tmp_path_factory.mktemp("tuned") / "model"
    result = quantize_to(model_folder(FAMILY), text_file, out, LAYER, nsamples=9, tune=TUNE)
    return out, result.tuned


def test_the_error_of_every_block_falls(tuned):
    _, records = tuned
    assert [record["block"] for record in records] == ["model.layers.0", "model.layers.1"]
    for record in records:
        assert record["error_after"] < 0.95 * record["error_before"]
        assert record["epoch"] > 0


def test_the_reported_errors_are_those_of_the_stored_block(
    tuned, model_folder, text_file, quantize_to, tmp_path
):
    """Recomputed with transformers' own forward, from the finished checkpoints."""
    folder = model_folder(FAMILY)
    quantize_to(folder, text_file, tmp_path / "plain", LAYER, nsamples=9)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    held = sample_sequences(ids, count=9, length=32, seed=0)[-1:]  # one in eight

    def first_block(model):
        with torch.no_grad():
            return model(held, output_hidden_states=True).hidden_states[1]

    target = first_block(original)
    record = tuned[1][0]
    for name, where in (("error_before", tmp_path / "plain"), ("error_after", tuned[0])):
        error = (first_block(rlo_gptq.load(where)) - target).square().sum()
        assert record[name] == pytest.approx(float(error / target.square().sum()), rel=1e-3)


def test_codes_stay_and_scales_and_norms_are_saved_and_loaded(
    tuned, model_folder, text_file, quantize_to, tmp_path
):
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "plain", LAYER, nsamples=9)
    before = load_file(tmp_path / "plain" / "model.safetensors")
    after = load_file(tuned[0] / "model.safetensors")
    first = "model.layers.0"
    assert torch.equal(
        before[f"{first}.self_attn.q_proj.weight"], after[f"{first}.self_attn.q_proj.weight"]
    )
    for name in ("self_attn.q_proj.scales", "mlp.down_proj.scales", "input_layernorm.weight"):
        assert not torch.equal(before[f"{first}.{name}"], after[f"{first}.{name}"])
        assert before[f"{first}.{name}"].dtype == after[f"{first}.{name}"].dtype
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    loaded = rlo_gptq.load(tuned[0]).state_dict()
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(loaded[f"{first}.{name}"], after[f"{first}.{name}"])


class StopAtBlockError(Exception):
    """The run is stopped."""


def test_a_stopped_run_goes_on_to_the_same_bits(
    tuned, model_folder, text_file, quantize_to, silent, tmp_path
):
    class Stop(type(silent)):
        def block(self, index, count, status):
            if index == 1:
                raise StopAtBlockError

    options = {"nsamples": 9, "tune": TUNE}
    with pytest.raises(StopAtBlockError):
        quantize_to(
            model_folder(FAMILY), text_file, tmp_path / "q", LAYER, progress=Stop(), **options
        )
    result = quantize_to(
        model_folder(FAMILY), text_file, tmp_path / "q", LAYER, progress=silent, **options
    )
    assert result.resumed == 1
    names = [record["block"] for record in silent.blocks_tuned]
    assert names == ["model.layers.0", "model.layers.1"]
    assert len(result.records) == 14
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tuned[0] / name).read_bytes()


def test_activations_on_disk_give_the_same_bits(
    tuned, model_folder, text_file, quantize_to, tmp_path
):
    quantize_to(
        model_folder(FAMILY),
        text_file,
        tmp_path / "q",
        LAYER,
        nsamples=9,
        tune=TUNE,
        offload=True,
    )
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        tuned[0] / "model.safetensors"
    ).read_bytes()


def test_steps_that_only_harm_leave_every_bit_as_it_was(
    model_folder, text_file, quantize_to, tmp_path
):
    folder = model_folder(FAMILY)
    quantize_to(folder, text_file, tmp_path / "plain", LAYER)
    wild = TuneSettings(epochs=1, learning_rate=1.0)
    result = quantize_to(folder, text_file, tmp_path / "q", LAYER, tune=wild)
    assert [record["epoch"] for record in result.tuned] == [0, 0]
    assert all(record["error_after"] == record["error_before"] for record in result.tuned)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "layer",
    [
        replace(LAYER, incoherence="none", rescale=False),
        replace(LAYER, sym=False),
        replace(LAYER, sym=False, integer_zero=True),
        replace(LAYER, group_size=10),
        replace(LAYER, group_size=0),
        replace(LAYER, incoherence="kronecker", incoherence_sides="both"),
        replace(LAYER, scale_dtype="bfloat16"),
        TRELLIS,
        replace(TRELLIS, incoherence="hadamard", group_size=8),
    ],
    ids=lambda layer: f"{layer.grid}-{layer.incoherence}-{layer.group_size}-{layer.sym}",
)
def test_every_grid_can_be_tuned_and_loads(layer, model_folder, text_file, quantize_to, tmp_path):
    tune = TuneSettings(epochs=8, learning_rate=0.01)
    result = quantize_to(
        model_folder("llama"), text_file, tmp_path / "q", layer, nsamples=9, tune=tune
    )
    assert all(record["error_after"] <= record["error_before"] for record in result.tuned)
    assert any(record["error_after"] < record["error_before"] for record in result.tuned)
    module = rlo_gptq.load(tmp_path / "q").model.layers[0].mlp.up_proj
    assert module.scales.dtype == getattr(torch, layer.scale_dtype)
    if layer.group_size == 0:
        assert bool((module.scales == module.scales[0, 0]).all())
    if layer.integer_zero:
        assert torch.equal(module.zeros, module.zeros.round())


def test_a_tuned_model_exports_to_what_others_read(model_folder, text_file, quantize_to, tmp_path):
    pytest.importorskip("compressed_tensors")
    from rlo_gptq.formats.export import export_checkpoint
    from rlo_gptq.formats.verify import verify_export

    layer = LayerSettings(bits=2, method="gptq", integer_zero=True)
    result = quantize_to(
        model_folder("llama"), text_file, tmp_path / "q", layer, nsamples=5, tune=TUNE
    )
    assert any(record["epoch"] for record in result.tuned)
    export_checkpoint(tmp_path / "q", tmp_path / "out", format="compressed-tensors")
    check = verify_export(tmp_path / "q", tmp_path / "out", "transformers")
    assert check.difference < 1e-3


@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen3", "gpt-neox", "mixtral"])
def test_blocks_of_every_kind_can_be_tuned(family, model_folder, text_file, quantize_to, tmp_path):
    tune = TuneSettings(epochs=6, learning_rate=0.01)
    result = quantize_to(
        model_folder(family), text_file, tmp_path / "q", LAYER, nsamples=9, tune=tune
    )
    assert all(record["error_after"] <= record["error_before"] for record in result.tuned)
    assert any(record["error_after"] < record["error_before"] for record in result.tuned)
    logits = rlo_gptq.load(tmp_path / "q")(torch.arange(2, 34)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_norms_of_queries_and_keys_are_among_what_is_tuned(model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    assert norm_names(model.model.layers[0]) == [
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]


def test_a_bfloat16_models_norms_are_measured_as_they_are_stored(
    model_folder, text_file, quantize_to, tmp_path
):
    folder = model_folder(FAMILY, torch.bfloat16)
    options = {"nsamples": 5, "tune": TUNE}
    quantize_to(folder, text_file, tmp_path / "q", LAYER, **options)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    # The second block saw the first with these norms: replaying it from the file changes nothing.
    before = (tmp_path / "q" / "model.safetensors").read_bytes()

    class Stop:
        layers, seen = 0, 0

        def block(self, index, count, status):
            if index == 1:
                raise StopAtBlockError

        def layer(self, record):
            pass

        def tuned(self, record):
            pass

    with pytest.raises(StopAtBlockError):
        quantize_to(folder, text_file, tmp_path / "r", LAYER, progress=Stop(), **options)
    quantize_to(folder, text_file, tmp_path / "r", LAYER, **options)
    assert (tmp_path / "r" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_two_processes_tune_as_one_does_to_rounding(tuned, model_folder, text_file, tmp_path):
    out = tmp_path / "q"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "rlo_gptq", "quantize", str(model_folder(FAMILY)), str(text_file)]
    command += ["--wbits", "2", "--quant", "gptq", "--incoh-processing", "--nsamples", "9"]
    command += ["--seqlen", "32", "--tune", "--tune-epochs", "2", "--tune-lr", "0.02"]
    done = subprocess.run(
        [*command, "--save", str(out), "--json"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((out / "run.json").read_text())["summary"]["tuned_blocks"]
    for one, two in zip(tuned[1], records, strict=True):
        assert two["error_after"] == pytest.approx(one["error_after"], rel=0.1)
    scales = "model.layers.0.self_attn.q_proj.scales"
    ours, theirs = load_file(tuned[0] / "model.safetensors"), load_file(out / "model.safetensors")
    torch.testing.assert_close(ours[scales], theirs[scales], atol=1e-3, rtol=1e-2)


def test_other_tuning_refuses_a_folder_that_was_begun(
    model_folder, text_file, quantize_to, tmp_path
):
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER)
    message = r'tune was null, now \{"epochs": 2, "learning_rate": 0.02\}'
    with pytest.raises(ResumeError, match=message):
        quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER, tune=TUNE)


def test_a_single_sequence_is_refused_for_none_could_be_held_out(
    model_folder, text_file, quantize_to, tmp_path
):
    message = "tuning needs at least 2 calibration sequences, one to be held out, got 1; give a"
    with pytest.raises(CalibrationError, match=message):
        quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER, nsamples=1, tune=TUNE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "tune epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "tune learning rate must be above 0 and at most 1, got 0.0"),
        ({"learning_rate": math.nan}, "tune learning rate must be above 0 and at most 1, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TuneSettings(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune-epochs", "3"], "--tune-epochs needs --tune"),
        (["--tune_lr", "0.1"], "--tune-lr needs --tune"),
        (
            ["--tune", "--unbiased"],
            "--tune moves the scales, which --unbiased fixes; leave one out",
        ),
        (["--tune", "--compat", "quip", "--qfn", "b"], "which --compat fixes; leave one out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, tmp_path):
    command = ["quantize", "model", "text", "--save", str(tmp_path / "q"), *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_command_reports_errors_before_and_after(model_folder, text_file, tmp_path):
    out = tmp_path / "q"
    command = ["quantize", str(model_folder(FAMILY)), str(text_file), "--save", str(out)]
    command += ["--quant", "gptq", "--nsamples", "5", "--seqlen", "32", "--tune"]
    result = CliRunner().invoke(main, [*command, "--tune-epochs", "2", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["block_error_after"] < document["block_error_before"]
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["tune"] == {"epochs": 2, "learning_rate": 0.01}
    assert len(run["summary"]["tuned_blocks"]) == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if line.get("kind") == "block"]
    assert [line["error_after"] for line in blocks] == [
        record["error_after"] for record in run["summary"]["tuned_blocks"]
    ]


@pytest.mark.slow
def test_tuning_lowers_the_perplexity_of_a_trained_model(shared_data, quantize_to, tmp_path):
    from rlo_gptq.evaluation.perplexity import evaluate_perplexity

    stories = shared_data / "tinystories-sample" / "stories.txt"
    found = []
    for name, tune in (("plain", None), ("tuned", TuneSettings())):
        layer = replace(LAYER, method="ldlqRG")
        quantize_to(
            shared_data / "stories260k",
            stories,
            tmp_path / name,
            layer,
            nsamples=8,
            seqlen=256,
            tune=tune,
        )
        measured = evaluate_perplexity(
            str(tmp_path / name), str(stories), context=256, max_tokens=8000
        )
        found.append(measured["perplexity"])
    assert found[1] < 0.95 * found[0]
