"""Text data sets by name and path, on small files and on the real text beside the repository."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from rlo_core.errors import DataError
from rlo_core.lm.text import hold_out, load_first_split, load_text


def test_a_text_file_is_one_running_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    data = load_text(str(path), "train")
    assert data.documents == ["one\ntwo\n"] == [data.joined]
    assert data.running
    assert not data.divided


def test_a_text_file_with_separators_is_documents(shared_data):
    data = load_text(str(shared_data / "tinystories-sample" / "stories.txt"), "train")
    assert len(data.documents) == 2316
    assert data.documents[0].startswith("One day, a little girl named Lily found a needle")
    assert not any("<|endoftext|>" in text for text in data.documents)
    assert not data.running


@pytest.mark.parametrize(("split", "words"), [("validation", 217_646), ("test", 245_569)])
def test_wikitext2_raw_picks_the_file_of_the_split(shared_data, split, words):
    data = load_text(str(shared_data / "wikitext2-raw"), split)
    assert data.divided
    assert data.running
    assert len(data.joined.split()) + data.joined.count("\n") == words  # the published sizes


def test_a_missing_split_is_refused_with_those_that_are_there(shared_data):
    folder = str(shared_data / "wikitext2-raw")
    with pytest.raises(
        DataError, match=rf"^data set '{folder}' has no train split; it has test, val"
    ):
        load_text(folder, "train")


def test_splits_are_read_from_file_and_folder_names(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["t0", "t1"], "id": [0, 1]}),
        tmp_path / "train-00000-of-00001.parquet",
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.txt").write_text("held out")
    (tmp_path / "README.txt").write_text("not data")
    assert load_text(str(tmp_path), "train").documents == ["t0", "t1"]
    assert load_text(str(tmp_path), "test").documents == ["held out"]


def test_the_first_split_that_a_data_set_has_is_taken(tmp_path):
    (tmp_path / "validation.txt").write_text("held out")
    data, split = load_first_split(str(tmp_path), ["test", "validation"])
    assert (data.documents, split) == (["held out"], "validation")
    with pytest.raises(DataError, match="train"):
        load_first_split(str(tmp_path), ["test", "train"])


def test_rows_that_are_lines_are_one_running_text(tmp_path):
    """So the hub stores WikiText: a line per row, its line end kept, empty rows between."""
    rows = ["", " = Title = \n", "", " A sentence . \n"]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    data = load_text(str(tmp_path / "a.parquet"), "train")
    assert data.running
    assert data.joined == "\n\n".join(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_rows_are_documents(tmp_path, name):
    rows = [{"text": "one\u2028two", "n": 1}, {"text": None}, {"text": "three"}]
    text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    data = load_text(str(tmp_path / name), "test", max_documents=2)
    assert data.documents == ["one\u2028two", ""]


def test_a_saved_data_set_is_read_by_split(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(
        str(tmp_path / "saved")
    )
    assert load_text(str(tmp_path / "saved"), "train").documents == ["x"]
    with pytest.raises(DataError, match=r"has no test split; it has train$"):
        load_text(str(tmp_path / "saved"), "test")


def test_the_text_column_is_found_or_asked_for(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"q": ["a"], "w": ["b"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=re.escape(f"which column of {path!r} is the text? it has q, w;")
    ):
        load_text(path, "train")
    assert load_text(path, "train", text_column="w").documents == ["b"]
    with pytest.raises(DataError, match=r"has no text column 'x'; it has q, w$"):
        load_text(path, "train", text_column="x")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "owner/name"])
def test_a_hub_name_without_a_network_says_what_works(name):
    with pytest.raises(
        DataError, match=rf"^data set '{name}' .*a local file or folder works without"
    ):
        load_text(name, "train")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(
        DataError, match=r"^no data set 'wikitext3': it must be c4, ptb, wikitext2, a hub"
    ):
        load_text("wikitext3", "train")


def test_empty_text_and_wrong_splits_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"has no text in its train split$"):
        load_text(str(tmp_path / "a.txt"), "train")
    with pytest.raises(
        DataError, match=r"^split must be one of train, validation, test, got 'dev'$"
    ):
        load_text(str(tmp_path / "a.txt"), "dev")  # type: ignore[arg-type]


def test_the_fingerprint_follows_the_content(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (load_text(str(tmp_path / f"{n}.txt"), "train").fingerprint for n in "abc")
    assert a == b != c


@pytest.mark.parametrize("separator", ["", "<|endoftext|>"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_held_out_text_is_the_rest_and_never_empty(tmp_path, separator, share):
    lines = [f"line number {i}\n" for i in range(50)]
    (tmp_path / "a.txt").write_text(separator.join(lines))
    data = load_text(str(tmp_path / "a.txt"), "train")
    first, last = hold_out(data, share)
    if separator:
        assert first.documents + last.documents == data.documents
    else:
        assert first.joined + last.joined == data.joined
    assert first.joined
    assert last.joined
    if share == 0.3:
        assert abs(len(last.joined) / len(data.joined) - 0.3) < 0.05


def test_one_line_cannot_be_divided(tmp_path):
    (tmp_path / "a.txt").write_text("only this")
    with pytest.raises(DataError, match=r"is one line; there is nothing to hold out$"):
        hold_out(load_text(str(tmp_path / "a.txt"), "train"))
