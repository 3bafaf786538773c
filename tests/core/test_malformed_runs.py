"""`rlo report` on run folders that no run wrote: a page, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rlo_core.cli.main import main
from rlo_core.runs.record import Run

GOOD = {"kind": "test", "loss": "ce", "seed": 0, "summary": {"ce": 0.5}}


def report(folder: Path) -> Result:
    out = folder.parent / "page.html"
    result = CliRunner().invoke(main, ["report", str(folder), "--out", str(out)])
    if result.exit_code != 0:
        assert result.exit_code == 1, result.exception
        assert result.output.startswith("Error: "), result.output
        assert result.output.count("\n") == 1
        assert not out.exists()
    out.unlink(missing_ok=True)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = Run.create(tmp_path / "run", kind="test")
    run.log(epoch=1, ce=0.5)
    run.log(epoch=2, ce=0.25)
    run.finish(ce=0.25)
    return tmp_path / "run"


DEEP = "[" * 100_000
BROKEN_RUNS = {
    "empty": ("", "run.json' is not JSON"),
    "cut off": ('{"kind": "te', "run.json' is not JSON"),
    "a list": ("[]", "run.json' must hold an object, got list"),
    "no text": ("\udcff\udcfe", "run.json' is not UTF-8 text"),
    "deep": (DEEP, "run.json' is nested too deeply"),
    "long number": ('{"seed": ' + "9" * 5000 + "}", "run.json' is not JSON: Exceeds the limit"),
    "half a pair": (r'{"kind": "\ud800"}', "run.json' holds text that is not Unicode"),
    "summary": ('{"summary": [1]}', "run.json': summary must be an object, got list"),
    "versions": ('{"versions": 3}', "run.json': versions must be an object, got int"),
    "machine": ('{"machine": "x"}', "run.json': machine must be an object, got str"),
    "started": ('{"started": 3}', "run.json': started must be a text, got int"),
    "loss": ('{"loss": {}}', "run.json': loss must be a text, got dict"),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_a_broken_run_file_is_one_line(folder: Path, name: str) -> None:
    text, message = BROKEN_RUNS[name]
    (folder / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = report(folder)
    assert result.exit_code == 1
    assert message in result.output


BROKEN_METRICS = {
    "a list": ("[]\n", "metrics.jsonl', line 1, must hold an object, got list"),
    "a cut line inside": ('{"epoch": 1\n{}\n', "metrics.jsonl', line 1, is not JSON"),
    "no text": ("\udcff\n", "metrics.jsonl' is not UTF-8 text"),
    "deep": (DEEP + "\n", "metrics.jsonl', line 1, is nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN_METRICS)
def test_broken_metrics_are_one_line(folder: Path, name: str) -> None:
    text, message = BROKEN_METRICS[name]
    (folder / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = report(folder)
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_one_line(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert report(folder).exit_code == 1


STRANGE_METRICS = {
    "a line that was cut off": '{"epoch": 1, "ce": 1}\n{"epoch": 2, "ce": 0.5}\n{"ep',
    "a dollar": '{"epoch": 1, "$\\\\frac": 1}\n{"epoch": 2, "$\\\\frac": 2}\n',
    "no number in places": '{"epoch": "nan", "ce": 1}\n{"epoch": NaN, "ce": Infinity}\n',
    "a huge integer": '{"epoch": 1, "ce": 1e400}\n{"epoch": ' + "9" * 400 + ', "ce": 2}\n',
    "lists": '{"epoch": [1], "ce": {}}\n{"epoch": null, "ce": true}\n',
    "markup": '{"epoch": 1, "<script>": 1}\n{"epoch": 2, "<script>": 2, "split": "</svg>"}\n',
}


@pytest.mark.parametrize("name", STRANGE_METRICS)
def test_strange_metrics_make_a_page(folder: Path, name: str) -> None:
    (folder / "metrics.jsonl").write_text(STRANGE_METRICS[name])
    assert report(folder).exit_code == 0


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["nan", "inf", "$x$", "a$b", "\0", "epoch", 10**400])
)  # fmt: skip
names = st.sampled_from(
    ["epoch", "step", "split", "loss", "seed", "ce", "notes", "kind", "summary", "started"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
documents: Any = st.dictionaries(names, values, max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(document=documents, records=st.lists(documents, max_size=4))
def test_any_json_makes_a_page_or_one_line(
    folder: Path, document: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    (folder / "run.json").write_text(json.dumps({**GOOD, **document}))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    report(folder)
