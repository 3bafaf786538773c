"""Text data sets by name or by path: what the language-model commands read.

A data set is `wikitext2`, `c4` or `ptb`, another hub data set as `owner/name[:config]`, or a local
file or folder. Local is always enough: nothing here needs a network unless a hub name is given, and
then the Hugging Face cache is asked first.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlo_core.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
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


@dataclass(frozen=True)
class _Hub:
    """A hub data set under a short name, joined as GPTQ's and QuIP's evaluations do."""

    path: str
    config: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None
    separator: str = "\n\n"
    running: bool = False


_NAMED = {
    "wikitext2": _Hub("Salesforce/wikitext", "wikitext-2-raw-v1", running=True),
    # The data set is a script, which `datasets` no longer runs; its parquet copy is on a branch.
    "ptb": _Hub(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "refs/convert/parquet",
        separator=" ",
        running=True,
    ),
    "c4": _Hub(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        separator=" ",
    ),
}


@dataclass(frozen=True)
class TextData:
    """The text of one split.

    Args:
        name: The data set as it was asked for.
        documents: Its documents, or the rows of a running text, in order, empty ones left in.
        joined: All of it as one string: what a perplexity over the whole set tokenizes.
        fingerprint: First 16 hexadecimal digits of the SHA-256 of the documents.
        running: The documents are pieces of one text (lines of WikiText), not separate texts:
            tokenize `joined`, not each of them with its own beginning-of-text token.
        divided: The source has splits. If not, every split is the same text: see `hold_out`.
    """

    name: str
    documents: list[str]
    joined: str
    fingerprint: str
    running: bool = False
    divided: bool = True


def load_text(
    dataset: str,
    split: Split,
    *,
    text_column: str | None = None,
    max_documents: int | None = None,
) -> TextData:
    """Return one split of a text data set.

    Args:
        dataset: `wikitext2`, `c4` (first shard; its test is its validation), `ptb`, a hub name
            `owner/name[:config]`, a .txt/.raw/.jsonl/.parquet file (.gz too, but for parquet), a
            folder of them, or a folder written by `datasets`' `save_to_disk`. In a folder whose
            files or subfolders are named by split (`wiki.valid.raw`, `train-00000.parquet`,
            `test/a.txt`), the split picks them; other folders and single files are given whole for
            every split.
        split: "train", "validation" or "test".
        text_column: The column of a table; by default `text`, or what else is obvious.
        max_documents: Stop after this many.

    Raises:
        DataError: no such data set, split or column; nothing in it; the hub is not reachable.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(dataset).expanduser()
    separator, running, divided = "\n\n", False, True
    if dataset in _NAMED:
        source = _NAMED[dataset]
        documents = _hub(dataset, source, split, text_column, max_documents)
        separator, running = source.separator, source.running
    elif path.is_file():
        divided = False
        documents = _file(path, text_column)
        running = len(documents) == 1 or _are_lines(documents)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        documents, divided = _saved(path, split, text_column)
        running = _are_lines(documents)
    elif path.is_dir():
        files, divided = _files_of(path, split)
        documents = [text for file in files for text in _file(file, text_column)]
        running = len(documents) == 1 or _are_lines(documents)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset):
        name, _, config = dataset.partition(":")
        documents = _hub(dataset, _Hub(name, config or None), split, text_column, max_documents)
        running = _are_lines(documents)
    else:
        raise DataError(
            f"no data set {dataset!r}: it must be {', '.join(sorted(_NAMED))}, a hub name "
            "owner/name, or a text, jsonl or parquet file or a folder of them"
        )
    documents = documents[:max_documents]
    if not any(text.strip() for text in documents):
        raise DataError(f"data set {dataset!r} has no text in its {split} split")
    return _text_data(dataset, documents, separator, running=running, divided=divided)


def hold_out(data: TextData, share: float = 0.1) -> tuple[TextData, TextData]:
    """Divide text into a first part and a held-out last part, without overlap.

    Whole documents where there are several, characters of a single running text (at a line end).

    Args:
        data: Text that has no splits of its own.
        share: What part is held out, in (0, 1).

    Raises:
        DataError: there is too little text to divide.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be in (0, 1), got {share}")
    pieces = data.documents if len(data.documents) > 1 else data.joined.splitlines(keepends=True)
    if len(pieces) < 2:
        raise DataError(f"data set {data.name!r} is one line; there is nothing to hold out")
    separator = "" if len(data.documents) == 1 else "\n\n"
    sizes = [len(piece) for piece in pieces]
    keep, count = (1.0 - share) * sum(sizes), 0
    cut = next(i for i, size in enumerate(sizes) if (count := count + size) >= keep)
    # At least one piece on either side, whatever their sizes.
    cut = min(max(cut, 1), len(pieces) - 1)
    parts = []
    for part in (pieces[:cut], pieces[cut:]):
        documents = part if separator else ["".join(part)]
        parts.append(
            _text_data(
                data.name, documents, separator or "\n\n", running=data.running, divided=True
            )
        )
    return parts[0], parts[1]


def _text_data(
    name: str, documents: list[str], separator: str, *, running: bool, divided: bool
) -> TextData:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return TextData(
        name, documents, separator.join(documents), digest.hexdigest()[:16], running, divided
    )


def _are_lines(rows: list[str]) -> bool:
    """Whether the rows are lines of one text: each empty, or ended by its only line break."""
    return all(not row or (row.endswith("\n") and row.count("\n") == 1) for row in rows)


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


def _files_of(folder: Path, split: str) -> tuple[list[Path], bool]:
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


def _file(path: Path, text_column: str | None) -> list[str]:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{str(path)!r} must be a .txt, .raw, .jsonl or .parquet file")
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            strings = [
                f.name for f in table.schema_arrow if str(f.type) in ("string", "large_string")
            ]
            column = _column(str(path), strings, text_column)
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
    column = _column(str(path), [k for k, v in rows[0].items() if isinstance(v, str)], text_column)
    return [str(row.get(column) or "") for row in rows]


def _lines(text: str) -> Iterable[str]:
    # Not splitlines(): JSON strings may hold U+2028, which is no line end here.
    return (line for line in text.split("\n") if line.strip())


def _column(where: str, strings: list[str], wanted: str | None) -> str:
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


def _saved(folder: Path, split: str, text_column: str | None) -> tuple[list[str], bool]:
    import datasets

    loaded: Any = datasets.load_from_disk(str(folder))
    divided = isinstance(loaded, datasets.DatasetDict)
    if divided:
        if split not in loaded:
            has = ", ".join(sorted(loaded))
            raise DataError(f"data set {str(folder)!r} has no {split} split; it has {has}")
        loaded = loaded[split]
    return _rows(str(folder), loaded, text_column), divided


def _rows(where: str, table: Any, text_column: str | None) -> list[str]:
    strings = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    return [row or "" for row in table[_column(where, strings, text_column)]]


def _hub(
    asked: str, source: _Hub, split: str, text_column: str | None, max_documents: int | None
) -> list[str]:
    import datasets

    rows = split if max_documents is None else f"{split}[:{max_documents}]"
    files = None if source.files is None else {split: source.files[split]}
    try:
        table = datasets.load_dataset(
            source.path, source.config, split=rows, revision=source.revision, data_files=files
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data set {asked!r} ({source.path}) is not in the local cache and could not be "
            f"fetched ({type(error).__name__}: {reason[:200]}); a local file or folder works "
            "without a network"
        ) from error
    return _rows(asked, table, text_column)
