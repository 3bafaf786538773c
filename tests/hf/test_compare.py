"""A language model in a comparison: a run is a finetuning, measured on each held-out token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rlo_core.cli.main import main
from rlo_core.compare.measures import Held
from rlo_core.lm.perplexity import perplexity
from rlo_hf.compare import TEMPERATURES, HFTask, feed
from rlo_hf.finetuning.options import FinetuneOptions
from transformers import LlamaConfig, LlamaForCausalLM


def test_tokens_are_measured_as_perplexity_measures_them() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    ids = torch.randint(model.config.vocab_size, (150,))
    held = Held(TEMPERATURES)
    feed(held, model, ids, 32)
    expected = perplexity(model, ids, context=32)
    found = held.result()
    assert found["samples"] == expected.tokens
    assert found["ce"] == pytest.approx(expected.ce, rel=1e-5)


def test_the_criterion_is_likelihood_and_the_command_has_finetunings_options() -> None:
    task = HFTask(FinetuneOptions(model="m", dataset="d"))
    assert task.criterion == "likelihood"
    assert task.rates[task.default] == 1e-4
    shown = CliRunner().invoke(main, ["compare", "hf", "--help"]).stdout
    assert "MODEL DATASET" in shown
    for option in ("--lora", "--block", "--trials", "--storage"):
        assert option in shown
    assert "--resume" not in shown


@pytest.mark.slow
def test_a_comparison_of_finetunings_ends_in_a_verdict(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("optuna")
    text = tmp_path / "text.txt"
    text.write_text((shared_data / "tinyshakespeare" / "input.txt").read_text()[:20_000])
    result = CliRunner().invoke(
        main,
        ["compare", "hf", str(shared_data / "stories260k"), str(text), "--max-steps", "2",
         "--block", "64", "--batch-size", "2", "--accumulation", "1", "--eval-tokens", "600",
         "--eval-context", "64", "--loss", "rlo", "--k", "5", "--rate", "1e-4,1e-3", "--seeds", "2",
         "--trials", "6", "--out", str(tmp_path / "cmp"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    verdict = json.loads(result.stdout)
    assert verdict["criterion"] == "likelihood"
    assert len(verdict["sentences"]) == 4
    assert (tmp_path / "cmp" / "report.html").is_file()
