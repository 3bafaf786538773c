"""The demo's language-model part: text that comes with Python, perplexity before and after."""

import io
import json
import math

import pytest
from click.testing import CliRunner
from rich.console import Console
from rlo_core.cli.main import main
from rlo_core.runs.record import read_metrics, read_run
from rlo_hf.demo import TABLE, demo, docstrings, reference


def test_its_text_is_pythons_own_and_the_held_out_half_is_another():
    assert "Return" in docstrings(100_000)
    train, held = reference()
    assert min(len(train), len(held)) > 100_000
    assert not set(train.split("\n\n")[:5]) & set(held.split("\n\n")[:5])


@pytest.mark.slow
def test_finetuning_lowers_held_out_perplexity_under_every_loss(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=120)
    summary = demo(
        tmp_path / "llm", console=console, losses=("ce", "rlo:k=5,m=5"), pretraining=12,
        finetuning=12,
    )  # fmt: skip
    rows = {row["loss"]: row for row in summary[TABLE]}
    assert set(rows) == {"ce", "rlo:k=5,m=5"}
    assert len({row["perplexity before"] for row in rows.values()}) == 1
    for loss, row in rows.items():
        assert row["perplexity after"] < 0.9 * row["perplexity before"]
        assert f"{row['perplexity after']}" in text.getvalue()
        logged = [r for r in read_metrics(tmp_path / "llm") if r.get("loss") == loss]
        assert [r["step"] for r in logged] == [0, 12]
        for record in logged:
            assert record["perplexity"] == pytest.approx(math.exp(record["ce"]))
    document = read_run(tmp_path / "llm")
    assert document["status"] == "done"
    assert document["data"]["held_tokens"] > 16_384


@pytest.mark.slow
def test_the_command_puts_it_in_the_report(tmp_path):
    result = CliRunner().invoke(main, ["demo", "llm", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert "perplexity after" in json.dumps(rows)
    page = (tmp_path / "report.html").read_text()
    assert "A tiny language model" in page
    assert "perplexity" in page
    assert (tmp_path / "a-language-model-held-out-perplexity.png").is_file()
