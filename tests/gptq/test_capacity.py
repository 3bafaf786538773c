"""`rlo-gptq plan`: sizes and counts from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rlo_gptq.cli.main import main
from rlo_gptq.pipeline.capacity import DEVICES, Ceilings, plan_capacity, rounding_cost
from rlo_gptq.settings import LayerSettings

CONFIGS = Path(__file__).parent / "configs"
TWO_BITS = LayerSettings(bits=2, incoherence="hadamard", rescale=True)
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "planning.md"


@pytest.fixture(scope="module")
def one():
    return plan_capacity(CONFIGS / "llama-3-8b", TWO_BITS)


def test_the_counts_are_those_of_the_model(one):
    assert one["parameters"] == 8_030_261_248
    assert one["blocks"] == 32
    assert one["layers"] == 7 * 32
    h, ff, kv = 4096, 14336, 1024
    assert one["quantized_parameters"] == 32 * (2 * h * h + 2 * h * kv + 3 * h * ff)
    tokens = 128 * 2048
    assert one["forward_tflop"] * 1e12 == pytest.approx(
        3.5 * 2 * tokens * one["quantized_parameters"], rel=1e-3
    )


def test_more_processes_share_the_sequences_and_layers_and_never_take_longer(one):
    eight = plan_capacity(CONFIGS / "llama-3-8b", TWO_BITS, processes=8)
    assert eight["sequences_per_process"] == 16
    assert eight["forward_seconds"] == pytest.approx(one["forward_seconds"] / 8, abs=0.2)
    assert one["rounding_seconds"] / 8 <= eight["rounding_seconds"] < one["rounding_seconds"]
    assert eight["peak_memory_bytes"] < one["peak_memory_bytes"]


def test_a_step_takes_the_longer_of_its_flops_and_its_bytes():
    cost = rounding_cost(4096, 4096, TWO_BITS)
    assert cost.seconds(1e12, 1e30) == pytest.approx(cost.flops / 1e12)
    assert cost.seconds(1e30, 1e12) == pytest.approx(cost.bytes / 1e12)
    ours = Ceilings(1e12, 1e12, 1e30, None)
    slow = plan_capacity(CONFIGS / "llama-3-8b", TWO_BITS, ceilings=ours, dtype="float32")
    total = slow["forward_tflop"] + slow["hessian_tflop"] + slow["rounding_tflop"]
    assert slow["seconds"] == pytest.approx(total, rel=1e-3)
    assert slow["fits"] is None


def test_experts_see_their_share_of_the_tokens():
    found = plan_capacity(CONFIGS / "mixtral-8x7b", TWO_BITS)
    assert found["parameters"] == 46_702_792_704
    h, ff, kv = 4096, 14336, 1024
    active = 32 * (2 * h * h + 2 * h * kv + 2 * 3 * h * ff)
    assert found["forward_tflop"] * 1e12 == pytest.approx(7 * 128 * 2048 * active, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("llama-3-8b", "Llama-3-8B"),
        ("llama-3-70b", "Llama-3-70B"),
        ("llama-3-405b", "Llama-3.1-405B"),
        ("mixtral-8x7b", "Mixtral-8x7B"),
    ],
)
def test_the_guide_says_what_the_command_says(config, name):
    for processes in (1, 8, 64):
        found = plan_capacity(CONFIGS / config, TWO_BITS, processes=processes)
        minutes = [
            f"{found[f'{step}seconds'] / 60:.1f}"
            for step in ("forward_", "hessians_", "rounding_", "")
        ]
        sizes = [f"{found[f'{x}_bytes'] / 1e9:.1f} GB" for x in ("checkpoint", "peak_memory")]
        row = " | ".join([name, str(processes), *sizes, *minutes])
        assert f"| {row} |" in GUIDE.read_text("utf-8")


def test_the_command_prints_one_document_and_reads_a_file_or_a_folder():
    for where in (CONFIGS / "llama-3-8b", CONFIGS / "llama-3-8b" / "config.json"):
        done = CliRunner().invoke(
            main,
            ["plan", str(where), "--wbits", "2", "--on", "a100", "--bandwidth", "1000", "--json"],
        )
        assert done.exit_code == 0, done.output
        document = json.loads(done.stdout)
        assert document["ceilings"]["bandwidth"] == 1e12
        assert document["ceilings"]["single"] == DEVICES["a100"].single


def test_a_folder_without_a_config_is_refused_in_one_line(tmp_path):
    done = CliRunner().invoke(main, ["plan", str(tmp_path)])
    assert done.exit_code == 1
    assert f"{str(tmp_path)!r} has no config to plan from" in done.output
    assert "Traceback" not in done.output
