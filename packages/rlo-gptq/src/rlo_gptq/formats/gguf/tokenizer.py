"""A tokenizer and its chat template as GGUF metadata.

Two kinds are written: byte-level BPE ("gpt2" to llama.cpp) and SentencePiece-like BPE with byte
fallback ("llama"), both read from `tokenizer.json`. llama.cpp splits text before BPE by rules that
it has names for; a splitting that has no name there is refused, as it would tokenize otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlo_gptq.formats.gguf.types import GGUFError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
# The regular expressions of splitting, by llama.cpp's name for them.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _TEKKEN: "tekken"}
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

Metadata = dict[str, tuple[str, Any]]


def tokenizer_metadata(folder: Path, vocabulary: int) -> Metadata:
    """Return the keys `tokenizer.*` of the tokenizer in a model's folder, with their value types.

    Args:
        folder: With tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja.
        vocabulary: Rows of the embedding; tokens that are missing are filled up as unused.

    Raises:
        GGUFError: there is no tokenizer.json, or llama.cpp cannot tokenize as it does.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        document = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GGUFError(f"{str(folder)!r} has no tokenizer.json that is readable: {reason}") from (
            error
        )
    model = document["model"]
    if model.get("type") != "BPE":
        raise GGUFError(f"--format gguf takes BPE tokenizers, got {model.get('type')!r}")
    tokens, types = _tokens(document, vocabulary)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    if model.get("byte_fallback"):
        found = _sentencepiece(document, tokens, types, merges)
    else:
        found = {
            "model": ("string", "gpt2"),
            "pre": ("string", _splitting(document.get("pre_tokenizer"))),
            "tokens": ("strings", tokens),
            "token_type": ("int32s", types),
            "merges": ("strings", merges),
        }
    for role, key in _ROLES.items():
        number = getattr(tokenizer, f"{role}_id", None)
        if number is not None:
            found[key] = ("uint32", int(number))
    # What the tokenizer does, not what its settings say.
    ids = tokenizer("a")["input_ids"]
    found["add_bos_token"] = ("bool", bool(ids) and ids[0] == tokenizer.bos_token_id)
    last = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    found["add_eos_token"] = ("bool", bool(last))
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        named["tokenizer.chat_template"] = ("string", str(template))
    return named


def _tokens(document: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return token and type of each number below `vocabulary`."""
    by_id = {number: token for token, number in document["model"]["vocab"].items()}
    unknown = document["model"].get("unk_token")
    types = dict.fromkeys(by_id, _NORMAL)
    for number, token in by_id.items():
        if token == unknown:
            types[number] = _UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
    for added in document.get("added_tokens", []):
        number = int(added["id"])
        by_id[number] = added["content"]
        if types.get(number) != _UNKNOWN:
            types[number] = _CONTROL if added["special"] else _USER
    if by_id and max(by_id) >= vocabulary:
        raise GGUFError(
            f"the tokenizer's numbers must be below the embedding's {vocabulary} rows, "
            f"got {max(by_id)}"
        )
    every = range(vocabulary)
    tokens = [by_id.get(number, f"[PAD{number}]") for number in every]
    return tokens, [types.get(number, 5) for number in every]  # 5: unused


def _sentencepiece(
    document: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> Metadata:
    """Return what llama.cpp needs to do BPE by scores: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for order, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), order)
    lowest = -float(len(merges) + 1)
    scores = [
        -float(rank[token]) if token in rank else (lowest if kind == _NORMAL else 0.0)
        for token, kind in zip(tokens, types, strict=True)
    ]
    text = json.dumps(document.get("normalizer")) + json.dumps(document.get("pre_tokenizer"))
    first = '"Prepend"' in text or '"prepend_scheme": "first"' in text
    return {
        "model": ("string", "llama"),
        "pre": ("string", "default"),
        "tokens": ("strings", tokens),
        "scores": ("float32s", scores),
        "token_type": ("int32s", types),
        "add_space_prefix": ("bool", first or '"prepend_scheme": "always"' in text),
    }


def _splitting(pre: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name for the way a byte-level tokenizer splits text.

    Raises:
        GGUFError: it has none.
    """
    parts = [] if pre is None else list(pre.get("pretokenizers", [pre]))
    kinds = [part["type"] for part in parts]
    regexes = [
        part["pattern"].get("Regex", "")
        for part in parts
        if part["type"] == "Split" and isinstance(part.get("pattern"), dict)
    ]
    if len(regexes) == 1 and regexes[0] in _SPLITS and kinds == ["Split", "ByteLevel"]:
        return _SPLITS[regexes[0]]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    raise GGUFError(
        "llama.cpp has no name for the way this tokenizer splits text "
        f"({', '.join(kinds) or 'no pre-tokenizer'}); take a GGUF file of the model as the source, "
        "whose tokenizer is copied as it is"
    )
