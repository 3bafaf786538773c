"""Where the bytes of a checkpoint are, read from the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlo_gptq.models.shards import read_header

_NUMBERED = re.compile(r"\.\d+\.")
OTHER = "norms and the rest"


def byte_shares(folder: Path) -> dict[str, int]:
    """Return the bytes of the weight files by what they hold, the largest first, `OTHER` last.

    Embedding, head, and the kinds of layers inside of the blocks (`down_proj`) are named; all else
    (norms, biases of unnamed modules, headers of files) is one share.
    """
    shares: dict[str, int] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += file.stat().st_size
        for name, entry in read_header(file)[0].items():
            begin, end = entry["data_offsets"]
            kind = kind_of(name)
            shares[kind] = shares.get(kind, 0) + int(end) - int(begin)
    shares.pop(OTHER, None)
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    rest = total - sum(ordered.values())
    return {**ordered, OTHER: rest} if total else {}


def kind_of(name: str) -> str:
    """Return which share a tensor belongs to, by its name."""
    owner = name.rpartition(".")[0]
    last = owner.rpartition(".")[2]
    if "norm" in last or last.startswith("ln"):
        return OTHER
    if _NUMBERED.search(name):
        return "experts" if ".experts." in name else last
    if "head" in last or last == "embed_out":
        return "head"
    return "embedding" if "embed" in last or last in ("wte", "wpe") else OTHER


def by_records(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the bytes of layers by their kind, from their bits and shapes: for a GGUF file."""
    shares: dict[str, float] = {}
    for record in records:
        if {"layer", "rows", "columns", "bits"} <= set(record):
            kind = kind_of(f"{record['layer']}.weight")
            size = record["rows"] * record["columns"] * float(record["bits"]) / 8
            shares[kind] = shares.get(kind, 0) + size
    return {k: round(v) for k, v in sorted(shares.items(), key=lambda item: -item[1])}
