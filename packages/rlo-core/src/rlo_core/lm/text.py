"""Text data sets by name or by path: what the language-model commands read.

A data set is `wikitext2`, `c4` or `ptb`, another hub data set as `owner/name[:config]`, or a local
file or folder. Local is always enough: nothing here needs a network unless a hub name is given, and
then the Hugging Face cache is asked first.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rlo_core.errors import DataError
from rlo_core.lm.text_files import files_of, read_documents, text_column_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


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
        documents = read_documents(path, text_column)
        running = len(documents) == 1 or _are_lines(documents)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        documents, divided = _saved(path, split, text_column)
        running = _are_lines(documents)
    elif path.is_dir():
        files, divided = files_of(path, split)
        documents = [text for file in files for text in read_documents(file, text_column)]
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


def load_first_split(dataset: str, splits: Sequence[str]) -> tuple[TextData, str]:
    """Return the first of some splits that a data set has, as `load_text` gives it, and its name.

    Raises:
        DataError: it has none of them; as `load_text` says of the last.
    """
    *others, last = splits
    for split in others:
        with contextlib.suppress(DataError):
            return load_text(dataset, cast("Split", split)), split
    return load_text(dataset, cast("Split", last)), last


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
    return [row or "" for row in table[text_column_of(where, strings, text_column)]]


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
