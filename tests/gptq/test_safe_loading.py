"""A checkpoint that is not what was written, or contradicts itself, is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import rlo_gptq
import torch
from click.testing import CliRunner
from rlo_gptq.checkpoint.validation import CheckpointError
from rlo_gptq.cli.main import main
from rlo_gptq.models.digests import DIGESTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def copied(quantized, tmp_path) -> Path:
    """A copy of a small quantized model, to be damaged."""
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << (at % 8)
    file.write_bytes(data)


def test_every_flipped_bit_is_found_and_the_tensor_is_named(copied):
    weights = copied / "model.safetensors"
    good = weights.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    draw = random.Random(3)
    for _ in range(12):
        at = draw.randrange(start, len(good))
        flip(weights, at)
        with pytest.raises(CheckpointError) as refused:
            rlo_gptq.load(copied)
        names = [
            name
            for name, entry in header.items()
            if name != "__metadata__"
            and entry["data_offsets"][0] <= at - start < entry["data_offsets"][1]
        ]
        assert str(refused.value) == (
            f"tensor {names[0]!r} in 'model.safetensors' is not what was written: damaged, or "
            "changed; get it again, or take it as it is with --no-verify (verify=False)"
        )
        weights.write_bytes(good)
    rlo_gptq.load(copied)


@pytest.mark.parametrize("at", [0, 3, 9, 40])
def test_a_flipped_bit_of_the_header_is_found(at, copied):
    flip(copied / "model.safetensors", at)
    with pytest.raises(CheckpointError, match="'model.safetensors'"):
        rlo_gptq.load(copied)


def test_an_edited_config_is_found_and_can_be_taken_as_it_is(copied, text_file):
    config = json.loads((copied / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="^'config.json' of .* is not what was written"):
        rlo_gptq.load(copied)
    assert rlo_gptq.load(copied, verify=False).config.rms_norm_eps == 1e-3
    arguments = ["eval", str(copied), str(text_file), "--context", "32", "--max-tokens", "64"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "--no-verify" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--no-verify"]).exit_code == 0
    assert CliRunner().invoke(main, arguments).exit_code == 1  # only that one command


def test_a_checkpoint_without_digests_loads(copied):
    (copied / DIGESTS).unlink()
    rlo_gptq.load(copied)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": {"../x": ""}, "tensors": {}}', "\0"])
def test_damaged_digests_cost_one_line(text, copied):
    (copied / DIGESTS).write_text(text)
    with pytest.raises(CheckpointError, match=DIGESTS):
        rlo_gptq.load(copied)


def settings(**changes):
    def edit(config):
        config["quantization_config"]["settings"].update(changes)

    return edit


def edited(**changes):
    return lambda config: config.update(changes)


CONTRADICTIONS = {
    "rescaling that is not undone": (settings(rescale=False), "has no use for 14"),
    "a rotation that is not undone": (settings(incoherence="none"), "has no use for 14"),
    "zeros that are not there": (settings(sym=False), "lacks tensor"),
    "other bits": (settings(bits=4), "must have shape"),
    "other groups": (settings(group_size=8), "must have shape"),
    "scales of another type": (settings(scale_dtype="bfloat16"), "must have type BF16"),
    "fewer blocks": (edited(num_hidden_layers=1), "has no use for"),
    "more blocks": (edited(num_hidden_layers=3), "lacks tensor"),
    "a narrower model": (edited(intermediate_size=40), "must have shape"),
    "another vocabulary": (edited(vocab_size=300), "must have shape"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused(case, copied):
    edit, message = CONTRADICTIONS[case]
    (copied / DIGESTS).unlink()
    config = json.loads((copied / "config.json").read_text())
    edit(config)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        rlo_gptq.load(copied)


def test_tensors_that_no_layer_takes_are_refused(copied):
    (copied / DIGESTS).unlink()
    weights = copied / "model.safetensors"
    with safe_open(weights, framework="pt") as stored:
        notes = stored.metadata()
    tensors = load_file(weights)
    save_file({**tensors, "model.layers.7.extra": torch.ones(2)}, weights, metadata=notes)
    with pytest.raises(CheckpointError) as refused:
        rlo_gptq.load(copied)
    assert str(refused.value) == (
        "config.json describes a model that has no use for 1 of the checkpoint's tensors, "
        "'model.layers.7.extra' among them"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_scales_that_give_no_finite_weights_are_refused(value, copied):
    (copied / DIGESTS).unlink()
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.scales"][0, 0] = value
    tensors[f"{name}.input_scale"][0] = 1e38
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"^tensor '{name}"):
        rlo_gptq.load(copied)
