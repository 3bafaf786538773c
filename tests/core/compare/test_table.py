"""`rlo compare table`, called as a user calls it, and what a table is read as."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pytest.importorskip("optuna")

from rlo_core.cli.main import main
from rlo_core.compare.table import TableTask
from rlo_core.compare.table_data import read_table
from rlo_core.errors import DataError, SpecError


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


QUICK = ["--k", "2", "--loss", "rlo", "--rate", "0.1,1", "--seeds", "2", "--trials", "6"]


def test_a_comparison_gives_a_verdict_a_report_and_the_winner_and_is_not_done_twice(tmp_path):
    out = tmp_path / "cmp"
    code, printed, said = call("table", "sklearn:breast_cancer", *QUICK, "--out", str(out),
                               "--json", "--apply")  # fmt: skip
    assert code == 0, said
    verdict = json.loads(printed)
    assert verdict == {**json.loads((out / "verdict.json").read_text()),
                       "applied": verdict["applied"]}  # fmt: skip
    assert verdict["choice"] in ("ce", "rlo:k=2")
    assert len(verdict["sentences"]) == 4
    page = (out / "report.html").read_text()
    for heading in ("Less ce, paired by seed", "Reliability: ce", "Criterion by rate",
                    "Seconds of a run", "calibration error after temperature scaling"):  # fmt: skip
        assert heading in page
    assert "http" not in page.replace("http://www.w3.org", "")
    winner = json.loads((out / "winner" / "winner.json").read_text())
    bunch = load_breast_cancer()
    scaled = (bunch.data - winner["mean"]) / winner["scale"]
    guess = scaled @ np.array(winner["coef"][0]) + winner["intercept"][0] > 0
    assert (guess == bunch.target).mean() == pytest.approx(verdict["applied"]["train_accuracy"])
    code, _, said = call("table", "sklearn:breast_cancer", *QUICK, "--out", str(out))
    assert (code, said) == (0, "")


def test_a_run_of_ce_is_scikit_learns_logistic_regression_on_the_same_split() -> None:
    task = TableTask(read_table("sklearn:breast_cancer"))
    found = task.run("ce", 1.0, 3)
    X, y = load_breast_cancer(return_X_y=True)
    a, b, c, d = train_test_split(X, y, test_size=0.2, random_state=3, stratify=y)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500)).fit(a, c)
    p = model.predict_proba(b)[np.arange(len(d)), d]
    assert found["accuracy"] == pytest.approx(model.score(b, d))
    assert found["ce"] == pytest.approx(-np.log(p).mean(), rel=1e-2)


def test_text_columns_gaps_and_gzip_are_read(tmp_path: Path) -> None:
    text = "size,colour,label\n1,red,yes\n?,blue,no\n3,red,yes\n"
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    table = read_table(str(packed))
    assert table.columns == ["size", "colour=blue", "colour=red"]
    np.testing.assert_equal(table.X, [[1, 0, 1], [np.nan, 1, 0], [3, 0, 1]])
    assert (table.classes, table.y.tolist()) == (["no", "yes"], [1, 0, 1])
    other = read_table(write(tmp_path / "u.csv", "colour,size,label\ngreen,2,no\n"),
                       "label", like=table)  # fmt: skip
    np.testing.assert_equal(other.X, [[2, 0, 0]])


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    file = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"y": ["b", "a"], "x": [1.5, None]}), file)
    table = read_table(str(file), "y")
    np.testing.assert_equal(table.X, [[1.5], [np.nan]])
    assert table.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,a\n2,a\n3,a\n", "t.csv has one class, 'a'; a comparison needs two or more"),
        (
            "x,y\n" + "1,a\n" * 20 + "2,b\n",
            "class 'b' of t.csv has 1 row; a held-out split needs two of each class, so leave it "
            "out or get more",
        ),
        (
            "x,y\n1,a\n2,b\n3,a\n4,b\n",
            "t.csv has 4 rows for 2 classes; a held-out fifth needs one of each class, 10 rows or "
            "more",
        ),
        ("x,y\n1\n", "line 2 of t.csv must have 2 fields, got 1"),
        ("x,y\n1,\n2,a\n", "column 'y' of t.csv has 1 rows without a label"),
        ("x,y\n", "t.csv must have a header and rows, got 1 lines"),
    ],
)
def test_a_table_that_cannot_be_compared_on_costs_one_line(tmp_path, text, message) -> None:
    file = write(tmp_path / "t.csv", text)
    code, printed, said = call("table", file, *QUICK, "--out", str(tmp_path / "o"))
    assert (code, printed, said) == (1, "", f"Error: {message}\n")
    assert not (tmp_path / "o").exists()


def test_other_mistakes_cost_one_line_too(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "x,y\n" + "1,a\n2,b\n" * 10)
    out = ["--out", str(tmp_path / "o")]
    assert call("table", file, "--target", "z", *out)[2] == (
        "Error: t.csv has no column 'z'; it has x, y\n"
    )
    assert call("table", "nowhere.csv", *out)[2].startswith("Error: data must be a CSV or Parquet")
    assert call("table", file, "--loss", "focal", *out)[2] == (
        "Error: loss 'focal' cannot be fitted by model 'logistic', which takes ce, rlo, "
        "rlo-convex; --model lightgbm takes every loss that has a link\n"
    )
    assert call("table", file, *QUICK[:-1], "2", *out)[2].startswith(
        "Error: a budget of 2 runs is too small for two seeds: 2 losses once each"
    )
    assert call("table", file, "--rate", "a,b", *out)[0] == 2
    assert not (tmp_path / "o").exists()


def test_trusted_rows_are_measured_beside_the_given_labels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 3))
    y = (x[:, 0] + 0.1 * random.normal(size=400) > 0).astype(int)
    wrong = np.where(random.random(400) < 0.3, 1 - y, y)
    lines = ["a,b,c,y", *(",".join(map(str, [*row, t])) for row, t in zip(x, wrong, strict=True))]
    table = read_table(write(tmp_path / "t.csv", "\n".join(lines)))
    right = ["a,b,c,y", *(",".join(map(str, [*row, t])) for row, t in zip(x, y, strict=True))]
    trusted = read_table(write(tmp_path / "r.csv", "\n".join(right)), like=table)
    record = TableTask(table, trusted=trusted).run("rlo:k=1", 1.0, 0)
    assert record["accuracy"] < 0.8 < record["trusted"]["accuracy"]
    assert 0.1 < record["sure_error"] < 0.45


def test_trees_take_every_link(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    task = TableTask(read_table("sklearn:wine"), model="lightgbm", trees=5)
    for loss in ("ce", "gce", "agce"):
        task.check(loss)
        assert 0.3 < task.run(loss, 0.1, 0)["accuracy"] <= 1.0
    with pytest.raises(SpecError) as caught:
        task.check("anl")
    assert str(caught.value) == "loss 'anl' has no link, so trees cannot be boosted with it"
    applied = task.apply("gce", 0.1, tmp_path)
    assert (tmp_path / "model.txt").exists()
    assert applied["rows"] == 178


def test_help_lists_the_hosts_and_imports_neither_torch_nor_optuna() -> None:
    import subprocess
    import sys

    program = (
        "import sys\nfrom rlo_core.cli.main import main\n"
        "sys.argv = ['rlo', 'compare', 'table', '--help']\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert not {'torch', 'optuna', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert "  table " in call("--help")[1]


def test_an_unreadable_table_is_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(DataError) as caught:
        read_table(str(file))
    assert str(caught.value).startswith("t.csv is no CSV file:")
