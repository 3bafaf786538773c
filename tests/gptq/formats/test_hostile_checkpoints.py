"""Damaged and hostile checkpoints are refused in one line, or loaded as what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rlo_gptq.checkpoint.validation import CheckpointError, check_sizes
from rlo_gptq.formats.export import export_checkpoint

PROGRAM = Path(__file__).with_name("fuzz_checkpoints.py")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


@pytest.fixture
def folders(make_checkpoint, tmp_path):
    """One checkpoint of ours with every kind of tensor, and one in the GPTQ format."""
    rotated = make_checkpoint(
        bits=3, sym=False, integer_zero=False, group_size=16, incoherence="hadamard", rescale=True
    ).rename(tmp_path / "rotated")
    plain = make_checkpoint(bits=4, group_size=32).rename(tmp_path / "plain")
    return {
        "ours": rotated,
        "gptq": export_checkpoint(plain, tmp_path / "gptq", format="gptq").folder,
    }


@pytest.mark.parametrize(
    ("how", "which", "first", "count"),
    [
        ("load", "ours", 0, 320),
        ("import", "gptq", 0, 240),
        pytest.param("load", "ours", 10_000, 3000, marks=pytest.mark.slow),
        pytest.param("import", "gptq", 10_000, 3000, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line_or_loaded_as_it_says(
    how, which, first, count, folders, tmp_path
):
    """A crash, a hang, 1 GiB more of memory, another exception, or weights that are not finite or
    not the file's would be seen.
    """
    records = fuzz(how, folders[which], tmp_path, first, count)
    bad = [r for r in records if r["outcome"] not in ("refused", "loaded")]
    assert not bad, bad[:5]
    kinds = Counter(record["outcome"] for record in records)
    assert min(kinds["refused"], kinds["loaded"]) > count / 20, (
        "both must occur, or nothing is seen"
    )
    for record in (r for r in records if r["outcome"] == "refused"):
        message = record["message"]
        assert message.strip(), record
        assert "\n" not in message, record
        assert len(message) < 1000, record
        if record["kind"] == "edit_tensor" and how == "load":
            assert record["what"] in message or "model.layers.999" in message, record


@pytest.mark.slow
def test_from_pretrained_gives_no_wrong_weights_either(folders, tmp_path):
    """Errors before our quantizer is asked are transformers' own; sizes are not checked there."""
    records = fuzz("from_pretrained", folders["ours"], tmp_path, 0, 128)
    bad = [r for r in records if r["outcome"].startswith("failed")]
    assert not [r for r in bad if r["kind"] != "edit_model_config"], bad[:5]


def test_a_model_larger_than_its_files_is_refused_before_it_is_built():
    headers = {"a": ((320, 32), "F32"), "b": ((32,), "F32")}
    check_sizes({"hidden_size": 32, "num_hidden_layers": 2, "max_window_layers": 28}, headers)
    with pytest.raises(CheckpointError) as refused:
        check_sizes({"text_config": {"num_hidden_layers": 10**7}}, headers)
    assert str(refused.value) == (
        "text_config.num_hidden_layers of config.json must be at most 2 for tensors like these, "
        "got 1e+07"
    )
    with pytest.raises(CheckpointError, match="^hidden_size of config.json must be at most 20480"):
        check_sizes({"hidden_size": 10**9}, headers)


def fuzz(how: str, folder: Path, scratch: Path, first: int, count: int) -> list[dict[str, str]]:
    arguments = [how, str(folder), str(scratch / "scratch"), str(first), str(first + count)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False
    )
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(records) == count, f"died after {records[-1:]}: {done.stderr[-2000:]}"
    return records
