"""One rule from text to tokens, whichever command reads the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from rlo_core.errors import DataError
from rlo_core.lm.text import TextData
from rlo_core.lm.tokens import token_blocks, token_ids, window_length


class Bytes:
    """A tokenizer of bytes that marks what it is told to mark: 256 begins, 257 ends."""

    def __init__(self, begin: bool = False, end: bool = False, has_end: bool = True) -> None:
        self.marks = begin, end
        self.bos_token_id, self.eos_token_id = 256, 257 if has_end else None

    def __call__(self, text, **options):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        begin, end = self.marks
        return {"input_ids": [256] * begin + list(text.encode()) + [257] * end}


def documents(*texts: str, running: bool = False) -> TextData:
    return TextData("t", list(texts), "\n\n".join(texts), "0", running=running)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Bytes(), [97, 98, 257, 99, 257]),
        (Bytes(begin=True), [256, 97, 98, 256, 99]),
        (Bytes(end=True), [97, 98, 257, 99, 257]),
        (Bytes(begin=True, end=True), [256, 97, 98, 257, 256, 99, 257]),
        (Bytes(has_end=False), [97, 98, 99]),
    ],
)
def test_documents_are_marked_once_and_empty_ones_left_out(tokenizer, expected):
    ids = token_ids(tokenizer, documents("ab", "", " \n", "c"))
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


def test_a_running_text_is_one_string():
    ids = token_ids(Bytes(begin=True), documents("ab", "", "c", running=True))
    assert bytes(ids.tolist()[1:]) == b"ab\n\n\n\nc"
    assert ids[0] == 256


def test_blocks_leave_the_remainder_out_and_refuse_less_than_one():
    assert token_blocks(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match=r"^the text has 3 tokens, which is less than one block of"):
        token_blocks(torch.arange(3), 4)


def test_a_window_is_the_models_context_and_at_most_2048():
    llama = transformers.LlamaConfig(max_position_embeddings=4096)
    assert window_length(llama) == 2048
    assert window_length(llama, 8192) == 8192  # rotated positions have no end
    opt = transformers.OPTConfig(max_position_embeddings=128)
    assert window_length(opt) == 128
    with pytest.raises(DataError, match=r"^context must be at most the model's 128, got 200"):
        window_length(opt, 200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlo_gptq.demo import byte_tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    byte_tokenizer().save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


TEXTS = [f"story {i} is about the number {i * 37 % 11}, and it ends here." for i in range(9)]


def a_text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(TEXTS))
    return path


def a_folder_of_files(folder: Path) -> Path:
    out = folder / "texts"
    out.mkdir()
    for i, text in enumerate(TEXTS):
        (out / f"{i}.txt").write_text(text)
    return out


def jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def parquet_with_empty_documents(folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = folder / "rows.parquet"
    rows = [text for pair in zip(TEXTS, ["", " \n"] * 9, strict=False) for text in pair]
    pyarrow.parquet.write_table(pa.table({"text": rows}), path)
    return path


def wikitext_lines(folder: Path) -> Path:
    """Rows as WikiText-2's: each a line with its end, or empty."""
    path = folder / "wiki.jsonl"
    rows = ["", " = Title = \n", "", *(f" {text} \n" for text in TEXTS)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "make",
    [a_text_file, a_folder_of_files, jsonl, parquet_with_empty_documents, wikitext_lines],
    ids=lambda make: make.__name__,
)
def test_both_commands_measure_one_perplexity_of_one_text(make, model, tmp_path):
    from rlo_gptq.cli.main import main as gptq
    from rlo_hf.cli import main as hf

    text = str(make(tmp_path))
    runner = CliRunner()
    words = ["finetune", str(model), text, "--eval-only", "--out", str(tmp_path / "run"), "--json"]
    first = runner.invoke(hf, words)
    assert first.exit_code == 0, first.output
    second = runner.invoke(gptq, ["eval", str(model), text, "--json"])
    assert second.exit_code == 0, second.output
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert one["eval_tokens"] == two["tokens"]
    assert one["perplexity_before"] == pytest.approx(two["perplexity"], rel=1e-6)
