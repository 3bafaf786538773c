"""Text files of a folder: which belong to a split, and the documents in each."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path

from rlo_core.errors import DataError

SEPARATOR = "<|endoftext|>"
"""A text file that has this mark is many documents; one without it is a single running text."""

_TEXT_FILES = (".txt", ".text", ".raw", ".tokens")
_JSON_FILES = (".jsonl", ".ndjson", ".json")
_NOT_DATA = {"readme", "license", "licence", "notice", "copying", "requirements"}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_COLUMNS = ("text", "sentence", "content", "story", "document")


def _split_of(path: Path) -> str | None:
    """Return the split that a path names, its file name first, then its folders inwards."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = (
        suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    )
    if last in _TEXT_FILES:
        return "text"
    if last in _JSON_FILES:
        return "json"
    return "parquet" if last == ".parquet" and suffixes[-1] != ".gz" else None


def files_of(folder: Path, split: str) -> tuple[list[Path], bool]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _kind(path) is not None
        and path.name.split(".")[0].lower() not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"folder {str(folder)!r} has no text, jsonl or parquet files")
    splits = {path: _split_of(path.relative_to(folder)) for path in found}
    if not any(splits.values()):
        return found, False
    chosen = [path for path in found if splits[path] == split]
    if not chosen:
        has = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"data set {str(folder)!r} has no {split} split; it has {has}")
    return chosen, True


def read_documents(path: Path, text_column: str | None) -> list[str]:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{str(path)!r} must be a .txt, .raw, .jsonl or .parquet file")
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            strings = [
                f.name for f in table.schema_arrow if str(f.type) in ("string", "large_string")
            ]
            column = text_column_of(str(path), strings, text_column)
            return [row or "" for row in table.read([column]).column(0).to_pylist()]
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    if kind == "json":
        return _json_rows(path, text, text_column)
    if SEPARATOR in text:
        return [piece.strip() for piece in text.split(SEPARATOR) if piece.strip()]
    return [text]


def _json_rows(path: Path, text: str, text_column: str | None) -> list[str]:
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else list(map(json.loads, _lines(text)))
        )
    except json.JSONDecodeError as error:
        raise DataError(f"{str(path)!r} is not JSON lines: {error}") from error
    if all(isinstance(row, str) for row in rows):
        return rows
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{str(path)!r} must hold one object or string per line")
    column = text_column_of(
        str(path), [k for k, v in rows[0].items() if isinstance(v, str)], text_column
    )
    return [str(row.get(column) or "") for row in rows]


def _lines(text: str) -> Iterable[str]:
    # Not splitlines(): JSON strings may hold U+2028, which is no line end here.
    return (line for line in text.split("\n") if line.strip())


def text_column_of(where: str, strings: list[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted in strings:
            return wanted
        raise DataError(f"{where!r} has no text column {wanted!r}; it has {', '.join(strings)}")
    for name in _COLUMNS:
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"which column of {where!r} is the text? it has {', '.join(strings) or 'no strings'}; "
        "name it with text_column"
    )
