"""The page beside a quantized model."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from rlo_core.runs.record import Run, read_run
from rlo_gptq.cli.main import main
from rlo_gptq.report.page import bits_map, error_map, write_page
from rlo_gptq.report.sizes import OTHER, byte_shares, kind_of
from rlo_gptq.report.words import in_words


@pytest.fixture(scope="module")
def made(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "q"
    arguments = ["quantize", model_folder("llama"), text_file, "--wbits", 3, "--quant", "nearest"]
    arguments += ["--incoh-processing", "--nsamples", 4, "--seqlen", 32, "--save", out]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return out


def test_the_shares_add_up_to_the_bytes_of_the_files(made):
    shares = byte_shares(made)
    assert sum(shares.values()) == (made / "model.safetensors").stat().st_size
    assert {"embedding", "head", "down_proj", "q_proj", OTHER} == set(shares) & {
        "embedding",
        "head",
        "down_proj",
        "q_proj",
        OTHER,
    }
    assert list(shares)[-1] == OTHER


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.11.mlp.down_proj.scales", "down_proj"),
        ("model.layers.0.mlp.experts.3.w1.weight", "experts"),
        ("model.layers.0.input_layernorm.weight", OTHER),
        ("model.norm.weight", OTHER),
        ("transformer.wte.weight", "embedding"),
        ("embed_out.weight", "head"),
    ],
)
def test_a_tensor_belongs_to_the_share_of_its_kind(name, kind):
    assert kind_of(name) == kind


def test_the_page_says_what_was_made_and_shows_every_layer_once(made):
    page = (made / "report.html").read_text()
    assert "Quantized: q" in page
    assert "14 linear layers quantized" in page
    assert "3 bits by nearest, a scale for each row, hadamard incoherence" in page
    assert "4 sequences of 32 tokens" in page
    assert re.search(r"MB of weight files, [\d.]+ MB before", page)
    squares = re.findall(r'<td style="--s: (\d+)" title="(\S+): proxy loss', page)
    assert len({name for _, name in squares}) == len(squares) == 14
    layers = read_run(made)["summary"]["layers_by_error"]
    strongest = max(squares, key=lambda square: int(square[0]))[1]
    assert strongest == layers[0]["layer"]  # the worst layer is the darkest square
    assert page.index("Where the bytes are") < page.index("Where it errs") < page.index("<details>")
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_kinds_stand_in_the_order_in_which_a_block_computes():
    names = ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "self_attn.o_proj")
    names += ("self_attn.v_proj", "self_attn.q_proj", "self_attn.k_proj")
    rows = [{"layer": f"m.layers.{b}.{n}", "proxy": 0.1 + b} for n in names for b in (10, 9)]
    found = error_map(rows)
    assert found is not None
    assert found.kinds == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    assert [name for name, _ in found.rows] == ["9", "10"]
    assert error_map([]) is None
    assert error_map([{"layer": "m.layers.0.x", "proxy": float("nan")}]) is None


def test_bits_are_drawn_where_they_differ():
    rows = [{"layer": f"m.layers.0.{n}", "bits": bits} for n, bits in (("a", 2), ("b", 4))]
    found = bits_map(rows)
    assert found is not None
    assert [cell.text for _, cells in found.rows for cell in cells] == ["2", "4"]
    assert bits_map(rows[:1] * 2) is None


def test_a_run_that_says_little_still_has_a_page(tmp_path):
    run = Run.create(tmp_path, kind="gptq quantize")
    run.finish(note="<b>")
    page = write_page(tmp_path, title="A <title>").read_text()
    assert "A &lt;title&gt;" in page
    assert "&lt;b&gt;" in page
    assert in_words({}) == []
