"""A model that is damaged, or made to do damage, is refused in one line before anything is done."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rlo_gptq.cli.main import main
from rlo_gptq.models.source import ModelSource
from safetensors.torch import load_file

BIN = "pytorch_model.bin"


class Evil:
    def __reduce__(self):
        return (Path.write_text, (Path("evil"), "was run"))


@pytest.fixture
def plain(model_folder, tmp_path) -> Path:
    """A model with an old torch file for weights."""
    folder = Path(shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / BIN)
    (folder / "model.safetensors").unlink()
    return folder


def refused(folder: Path, text_file: Path, out: Path) -> str:
    arguments = ["quantize", str(folder), str(text_file), "--save", str(out), "--nsamples", "2"]
    result = CliRunner().invoke(main, [*arguments, "--seqlen", "16", "--wbits", "4"])
    assert result.exit_code == 1, repr(result.exception)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert not out.exists()
    return result.stderr


BINS = {
    "not a pickle": (b"garbage" * 100, "is not a file of tensors"),
    "empty": (b"", "is not a file of tensors"),
    "a pickle that runs code": (pickle.dumps(Evil()), "is not a file of tensors"),
}


@pytest.mark.parametrize("case", BINS)
def test_a_bin_file_that_holds_no_tensors_is_refused(case, plain, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = BINS[case]
    (plain / BIN).write_bytes(data)
    assert message in refused(plain, text_file, tmp_path / "q")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("value", [[1, 2], {"a": 3}, {1: torch.ones(2)}])
def test_a_bin_file_of_other_things_than_tensors_is_refused(value, plain, text_file, tmp_path):
    torch.save(value, plain / BIN)
    assert "must hold tensors by name, got" in refused(plain, text_file, tmp_path / "q")


def test_a_truncated_bin_file_is_refused(plain, text_file, tmp_path):
    whole = (plain / BIN).read_bytes()
    (plain / BIN).write_bytes(whole[: len(whole) // 2])
    assert "is not a file of tensors" in refused(plain, text_file, tmp_path / "q")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": [1]}}',
        "{",
        "1",
    ],
)
def test_an_index_that_is_none_is_refused(index, plain, text_file, tmp_path):
    (plain / "model.safetensors.index.json").write_text(index)
    assert "is not an index of weight files" in refused(plain, text_file, tmp_path / "q")


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_none_is_refused(config, plain, text_file, tmp_path):
    (plain / "config.json").write_text(config)
    refused(plain, text_file, tmp_path / "q")


def test_a_folder_that_cannot_be_written_costs_one_line(model_folder, text_file, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["quantize", str(model_folder("llama-gqa-tied")), str(text_file), "--wbits", "4"]
    arguments += ["--nsamples", "2", "--seqlen", "16", "--save", str(tmp_path / "file" / "q")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "Not a directory" in result.stderr


def test_config_json_is_read_as_what_it_says(plain):
    assert (
        ModelSource(plain).config.hidden_size
        == json.loads((plain / "config.json").read_text())["hidden_size"]
    )
