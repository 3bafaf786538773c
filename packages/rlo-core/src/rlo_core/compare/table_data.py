"""A table from a file: CSV, gzipped CSV, Parquet, or one that scikit-learn ships."""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlo_core.errors import DataError

SHIPPED = ("breast_cancer", "digits", "iris", "wine")


@dataclass(frozen=True)
class Table:
    """Columns and labels.

    Attributes:
        name: What it is called.
        X: (N, d), float64 with NaN for gaps; a column of text is one column for each of its values.
        y: Class numbers, (N).
        classes: Their names.
        columns: The names of the columns of X.
    """

    name: str
    X: NDArray[np.float64]
    y: NDArray[np.int64]
    classes: list[str]
    columns: list[str]

    def fingerprint(self) -> str:
        """Return a hash of what is in it."""
        digest = hashlib.sha256(np.ascontiguousarray(self.X).tobytes() + self.y.tobytes())
        digest.update(repr((self.classes, self.columns)).encode())
        return digest.hexdigest()[:16]


def read_table(data: str, target: str | None = None, *, like: Table | None = None) -> Table:
    """Read a table.

    Args:
        data: A .csv, .csv.gz, .tsv or .parquet file, or `sklearn:NAME`.
        target: The column of the labels; the last one if left out.
        like: Give the columns and classes of this table, for a second file with the same ones.

    Raises:
        DataError: the file, the column or its values are not as they have to be.
    """
    if data.startswith("sklearn:"):
        return _shipped(data)
    path = Path(data)
    if not path.is_file():
        raise DataError(
            f"data must be a CSV or Parquet file, or sklearn:NAME with NAME of "
            f"{', '.join(SHIPPED)}, got {data!r}, which is not there"
        )
    names, columns = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    label = target if target is not None else names[-1]
    if label not in names:
        raise DataError(f"{path.name} has no column {label!r}; it has {', '.join(names)}")
    given = [_text(value) for value in columns[names.index(label)]]
    gaps = sum(value == "" for value in given)
    if gaps:
        raise DataError(f"column {label!r} of {path.name} has {gaps} rows without a label")
    features = {name: columns[i] for i, name in enumerate(names) if name != label}
    return _table(path.name, features, given, like)


def _table(
    name: str, features: Mapping[str, Sequence[Any]], labels: list[str], like: Table | None
) -> Table:
    classes = like.classes if like else sorted(set(labels), key=_order)
    number = {value: i for i, value in enumerate(classes)}
    unknown = sorted(set(labels) - set(number))
    if unknown:
        raise DataError(f"{name} has the class {unknown[0]!r}, which the training data has not")
    blocks: dict[str, NDArray[np.float64]] = {}
    for column, values in features.items():
        numbers = _numbers(values)
        if numbers is not None:
            blocks[column] = numbers
            continue
        text = [_text(value) for value in values]
        for value in sorted(set(text)):
            blocks[f"{column}={value}"] = np.array([v == value for v in text], dtype=np.float64)
    wanted = like.columns if like else list(blocks)
    if not wanted:
        raise DataError(f"{name} has no column besides the labels")
    missing = [c for c in wanted if c not in blocks and "=" not in c]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}, which the training data has")
    zeros = np.zeros(len(labels))
    X = np.stack([blocks.get(column, zeros) for column in wanted], axis=1)
    y = np.array([number[value] for value in labels], dtype=np.int64)
    return Table(name, X, y, list(classes), wanted)


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _numbers(values: Sequence[Any]) -> NDArray[np.float64] | None:
    """Return a column of numbers, NaN for gaps; None where a value is none."""
    found = np.empty(len(values))
    for i, value in enumerate(values):
        text = _text(value)
        try:
            found[i] = float("nan") if text in ("", "?", "NA", "nan") else float(text)
        except ValueError:
            return None
    return found


def _csv(path: Path) -> tuple[list[str], list[list[Any]]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            tabs = "\t" in first and "," not in first
            delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path.name} is no CSV file: {error}") from error
    if len(rows) < 2:
        raise DataError(f"{path.name} must have a header and rows, got {len(rows)} lines")
    header = rows[0]
    if len(set(header)) < len(header):
        raise DataError(f"{path.name} must have a header with a name for each column, once each")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise DataError(
                f"line {number} of {path.name} must have {len(header)} fields, got {len(row)}"
            )
    return header, [list(column) for column in zip(*rows[1:], strict=True)]


def _parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise DataError(
            "a Parquet file needs pyarrow; install it with `pip install 'rlo-core[text]'`"
        ) from error
    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name} is no Parquet file: {str(error).splitlines()[0]}") from error
    return list(table.column_names), [column.to_pylist() for column in table.columns]


def _shipped(data: str) -> Table:
    from sklearn import datasets

    name = data.partition(":")[2]
    if name not in SHIPPED:
        raise DataError(f"sklearn: must name one of {', '.join(SHIPPED)}, got {name!r}")
    bunch = getattr(datasets, f"load_{name}")()
    return Table(
        data,
        np.asarray(bunch.data, dtype=np.float64),
        np.asarray(bunch.target, dtype=np.int64),
        [str(c) for c in bunch.target_names],
        [str(c) for c in getattr(bunch, "feature_names", range(bunch.data.shape[1]))],
    )
