"""Bits chosen within a size: probes against the definition, sizes against files, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rlo_gptq
import torch
import transformers
from click.testing import CliRunner
from rlo_core.errors import RLOError
from rlo_gptq.allocation.choose import (
    allocate,
    budget_bytes,
    largest,
    predicted,
    smallest,
)
from rlo_gptq.allocation.probes import PROBE_BITS
from rlo_gptq.allocation.run import choose_bits, probed
from rlo_gptq.allocation.units import Units
from rlo_gptq.budget import Budget
from rlo_gptq.cli.main import main
from rlo_gptq.evaluation.inspect_layers import inspect_model
from rlo_gptq.models.fold import check_foldable
from rlo_gptq.models.outside import find_outside
from rlo_gptq.models.source import ModelSource
from rlo_gptq.options import Options, layer_seed
from rlo_gptq.pipeline.blocks import load_calibration
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.run import run_quantization
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings

LAYER = LayerSettings(bits=2, method="ldlq", incoherence="hadamard", rescale=True)
ALONE = Processes(0, 1, torch.device("cpu"))
TOKENS = 64


def options_for(model, text, **changes):
    given = {"nsamples": 4, "seqlen": 32, **changes}
    return Options(str(model), str(text), LAYER, **given)


@pytest.fixture(scope="module")
def tied(model_folder, text_file, tmp_path_factory):
    """A small tied Llama, its units and probes; not to be changed."""
    options = options_for(model_folder("llama-gqa-tied"), text_file)
    folder = tmp_path_factory.mktemp("probes") / "p"
    with probed(options, folder, tokens=TOKENS, processes=ALONE, note=lambda *_: None) as (
        units,
        probes,
    ):
        yield options, folder, units, probes


def full_divergence(dense, changed, ids):
    """KL of the whole distributions, in float64."""
    with torch.no_grad():
        p = dense(ids).logits.double().log_softmax(-1)
        q = changed(ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
)
def test_a_probe_is_the_divergence_of_the_whole_model_with_one_layer_rounded(tied, name):
    options, _, _, probes = tied
    source = ModelSource(Path(options.model))
    sequences, _ = load_calibration(options, source, 32)
    source.close()
    pieces = sequences[: TOKENS // 32]
    dense = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    changed = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    inputs = []
    linear = changed.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for row in sequences:
            changed(row[None])
    handle.remove()
    x = torch.cat(inputs).reshape(-1, linear.in_features).double()
    hessian = (x.T @ x / len(x)).float()
    block = name.rpartition(".layers.")[0] + ".layers." + name.split(".")[2]
    first = "self_attn.q_proj" if "v_proj" in name else "mlp.down_proj"
    seed = layer_seed(options.seed, f"{block}.{first}")
    rounded = quantize_layer(linear.weight, hessian, LAYER.with_bits(PROBE_BITS), seed=seed)
    linear.weight.data = rounded.dequantize()
    expected = sum(full_divergence(dense, changed, row[None]) for row in pieces) / len(pieces)
    measured = probes.units[name]
    assert measured["kl"] == pytest.approx(expected, rel=0.02)
    assert measured["proxy"][str(PROBE_BITS)] == pytest.approx(rounded.proxy, rel=0.02)


def test_proxy_losses_fall_with_the_bits_and_the_prediction_with_them(tied):
    _, _, units, probes = tied
    for unit in units.units:
        losses = [probes.loss(unit.name, bits) for bits in sorted(unit.bytes)]
        assert losses == sorted(losses, reverse=True)
    assert predicted(units, probes, smallest(units)) > predicted(units, probes, largest(units))


@pytest.mark.parametrize("rotate", [None, "fold"])
@pytest.mark.parametrize("family", ["llama-gqa-tied", "qwen2"])
def test_the_size_of_a_choice_is_that_of_the_file_to_the_byte(
    family, rotate, model_folder, text_file, tmp_path
):
    model = model_folder(family)
    options = options_for(model, text_file, rotate=rotate)
    source = ModelSource(model)
    folded = None
    if rotate and find_outside(source.model)[2]:
        folded = check_foldable(source.config.to_dict()).rotation
    units = Units(source, options, folded=folded)
    choice = {
        unit.name: sorted(unit.bytes)[number % len(unit.bytes)]
        for number, unit in enumerate(units.units)
    }
    size, chosen = units.file_bytes(choice), units.options_of(choice)
    source.close()
    document = run_quantization(chosen, tmp_path / "q", device="cpu", progress=False)
    assert document["bytes"] == size == inspect_model(str(tmp_path / "q"))["file_bytes"]


def test_a_choice_fits_the_budget_and_beats_the_uniform_model_of_its_size(tied):
    _, _, units, probes = tied
    uniform = units.uniform(3)
    size = units.file_bytes(uniform)
    found = allocate(units, probes, size)
    assert found.bytes <= size
    assert found.kl <= predicted(units, probes, uniform)
    assert budget_bytes(units, Budget(average_bits=3)) == size
    between = budget_bytes(units, Budget(average_bits=2.5))
    assert units.file_bytes(units.uniform(2)) < between < size


def test_a_size_that_nothing_fits_is_refused_with_the_smallest_that_does(
    model_folder, text_file, tmp_path
):
    options = options_for(model_folder("llama-gqa-tied"), text_file)
    with pytest.raises(RLOError) as caught:
        choose_bits(options, tmp_path / "q", Budget(bytes=1000), tokens=TOKENS, device="cpu")
    source = ModelSource(model_folder("llama-gqa-tied"))
    units = Units(source, options, folded=None)
    least = units.file_bytes(smallest(units))
    source.close()
    assert str(caught.value) == (
        f"--bytes 1000 must leave {least / 1e6:.2f} MB for the smallest bits of every layer, got "
        f"0.00 MB; give --bytes {least} or more"
    )
    assert not (tmp_path / "q").exists()


def test_probes_go_on_where_they_were_stopped_to_the_same_numbers(
    tied, model_folder, text_file, tmp_path
):
    _, _, _, expected = tied
    options = options_for(model_folder("llama-gqa-tied"), text_file)

    def stop(index, count, status):
        if status == "probe" and index == 1:
            raise KeyboardInterrupt

    told = []
    with (
        pytest.raises(KeyboardInterrupt),
        probed(options, tmp_path / "p", tokens=TOKENS, processes=ALONE, note=stop),
    ):
        pass
    with probed(
        options,
        tmp_path / "p",
        tokens=TOKENS,
        processes=ALONE,
        note=lambda index, count, status: told.append((index, status)),
    ) as (_, probes):
        pass
    assert (0, "replay") in told
    assert (1, "probe") in told
    for name, measured in expected.units.items():
        again = probes.units[name]
        assert (again["kl"], again["proxy"]) == (measured["kl"], measured["proxy"])


def test_probes_of_other_settings_are_refused(tied, model_folder, text_file):
    _, folder, _, _ = tied
    options = options_for(model_folder("llama-gqa-tied"), text_file, seed=5)
    with (
        pytest.raises(RLOError, match=r"was measured with other settings \(seed, tokens\)"),
        probed(options, folder, tokens=TOKENS, processes=ALONE, note=lambda *_: None),
    ):
        pass


def test_a_fixed_layer_and_a_fixed_embedding_stay(model_folder, text_file, tmp_path):
    options = options_for(
        model_folder("qwen2"), text_file, bits=(("mlp.down_proj", 6),), embed_bits=8
    )
    chosen, shown = choose_bits(
        options, tmp_path / "q", Budget(average_bits=3), tokens=TOKENS, device="cpu"
    )
    assert chosen.embed_bits == 8
    assert {bits for name, bits in shown["units"].items() if "down_proj" in name} == {6}
    assert shown["bytes"] <= shown["budget_bytes"]


def test_experts_of_a_block_share_their_bits(model_folder, text_file):
    source = ModelSource(model_folder("mixtral"))
    units = Units(source, options_for(model_folder("mixtral"), text_file), folded=None)
    source.close()
    experts = [unit for unit in units.units if "experts" in unit.name]
    assert {len(unit.layers) for unit in experts} == {3}
    assert len(experts) == len({unit.name for unit in experts})


def test_the_command_quantizes_within_a_size_and_says_what_it_chose(
    model_folder, text_file, tmp_path
):
    model, out = str(model_folder("llama-gqa-tied")), tmp_path / "q"
    arguments = ["quantize", model, str(text_file), "--save", str(out), "--incoh-processing"]
    arguments += ["--nsamples", "4", "--seqlen", "32", "--quant", "ldlq", "--probe-tokens", "64"]
    arguments += ["--bytes", "20kB"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    found = document["allocation"]
    assert document["bytes"] == found["bytes"] <= found["budget_bytes"] == 20000
    assert {row["kind"] for row in found["kinds"]} >= {"mlp.down_proj", "embedding"}
    model = rlo_gptq.load(out)
    assert (
        model.get_submodule("model.layers.0.mlp.up_proj").bits
        == found["units"]["model.layers.0.mlp.up_proj"]
    )
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0, again.output
    assert "complete already" in again.output
    assert "how many have which" in again.output


def test_pareto_tabulates_and_draws_from_probes_that_are_there(tied, tmp_path):
    options, folder, _, _ = tied
    before = (folder / "probes.json").read_text()
    arguments = ["pareto", options.model, options.dataset, "--save", str(folder)]
    arguments += ["--incoh-processing", "--quant", "ldlq", "--nsamples", "4", "--seqlen", "32"]
    arguments += ["--probe-tokens", str(TOKENS), "--points", "5", "--device", "cpu"]
    for ending in ("svg", "html"):
        picture = tmp_path / f"curve.{ending}"
        result = CliRunner().invoke(main, [*arguments, "--plot", str(picture)])
        assert result.exit_code == 0, result.output
        assert "<svg" in picture.read_text()
    assert "all 3" in result.output
    document = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    sizes = [row["bytes"] for row in document["curve"]]
    losses = [row["predicted_kl"] for row in document["curve"]]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert (folder / "probes.json").read_text() == before
    refused = CliRunner().invoke(main, [*arguments, "--plot", "curve.pdf"])
    assert "--plot must end in .svg, .png or .html, got 'curve.pdf'" in refused.output


def test_a_dry_run_says_which_sizes_there_are(model_folder, text_file, tmp_path):
    arguments = ["quantize", str(model_folder("llama-gqa-tied")), str(text_file), "--dry-run"]
    arguments += ["--save", str(tmp_path / "q"), "--json", "--bytes", "20000"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["smallest_bytes"] < plan["budget_bytes"] == 20000 < plan["largest_bytes"]
    assert not (tmp_path / "q").exists()


def test_bits_are_read_from_a_yaml_file_and_flags_go_before_it(model_folder, text_file, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(
        "wbits: 3\nincoh-processing: true\nbits:\n  mlp.down_proj: 6\n  layers.0: 2\n"
    )
    arguments = ["quantize", str(model_folder("llama-gqa-tied")), str(text_file), "--dry-run"]
    arguments += ["--save", str(tmp_path / "q"), "--json", "-c", str(config)]
    plan = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert plan["settings"]["bits"] == 3
    assert plan["settings"]["incoherence"] == "hadamard"
    assert [part.split(":")[0] for part in plan["bits"].split(", ")] == ["2", "3", "6"]
    flagged = json.loads(CliRunner().invoke(main, [*arguments, "--wbits", "4"]).stdout)
    assert flagged["settings"]["bits"] == 4


@pytest.mark.parametrize(
    ("extra", "text", "message"),
    [
        (["--bytes", "1MB", "--average-bits", "3"], "", "exclude each other"),
        (["--probe-tokens", "64"], "", "--probe-tokens needs --bytes or --average-bits"),
        (["--bytes", "many"], "", "must be a size such as 60MB, 1.5GB or 58MiB, got 'many'"),
        (
            ["--bytes", "1MB", "--format", "gguf"],
            "",
            "--bytes takes no --format gguf: its --type decides every layer's",
        ),
        (["--bits", "up_proj=9"], "", "--bits of 'up_proj' must be one of 2, 3, 4, 5, 6, 8, got 9"),
        (
            ["-c", "s.yaml"],
            "wbit: 3",
            "'s.yaml' has an unknown option 'wbit'; did you mean 'wbits'",
        ),
        (["-c", "s.yaml"], "[1]", "'s.yaml' must hold options, such as wbits: 3, got list"),
        (["-c", "s.yaml"], "sym: 3", "'s.yaml': sym must be true or false, got 3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    extra, text, message, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(text)
    arguments = ["quantize", str(model_folder("llama")), str(text_file), "--save", "q", *extra]
    result = CliRunner().invoke(main, [*arguments, "--dry-run"], standalone_mode=True)
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception or "")).split())
