"""Bits of some layers, by rules such as `mlp.down_proj=4,layers.0=6`; imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from rlo_core.errors import RLOError

from rlo_gptq.settings import BITS

Rules = tuple[tuple[str, int], ...]
"""Pairs of a pattern of layer names and the bits of the layers that match."""


class BitRuleError(RLOError):
    """A rule for bits that cannot be read, or that no layer follows."""


def parse_rules(given: str | Mapping[str, object] | Iterable[str]) -> Rules:
    """Return rules from `--bits`'s text, from several of them, or from YAML's mapping.

    Args:
        given: "PATTERN=BITS,PATTERN=BITS", a sequence of such texts, or {PATTERN: BITS}.

    Raises:
        BitRuleError: a part is no rule, or its bits are none of 2, 3, 4, 5, 6, 8.

    Example:
        >>> parse_rules("mlp.down_proj=4, layers.0=6")
        (('mlp.down_proj', 4), ('layers.0', 6))
    """
    if isinstance(given, Mapping):
        pairs: list[tuple[str, object]] = [(str(name), bits) for name, bits in given.items()]
    else:
        texts = [given] if isinstance(given, str) else list(given)
        pairs = []
        for part in ",".join(texts).split(","):
            name, sign, bits = (word.strip() for word in part.partition("="))
            if not sign or not name:
                raise BitRuleError(
                    f"--bits must be made of NAME=BITS, e.g. mlp.down_proj=4,layers.0=6, got "
                    f"{part.strip()!r}"
                )
            pairs.append((name, int(bits) if bits.isdecimal() else bits))
    for name, number in pairs:
        if type(number) is not int or number not in BITS:
            raise BitRuleError(
                f"--bits of {name!r} must be one of {', '.join(map(str, BITS))}, got {number!r}; "
                "--skip leaves layers as they are"
            )
    return tuple((name, number) for name, number in pairs if isinstance(number, int))


def matches(name: str, pattern: str) -> bool:
    """Return whether a layer's full name has the pattern as a run of its parts.

    Example:
        >>> matches("model.layers.1.mlp.down_proj", "layers.1")
        True
        >>> matches("model.layers.10.mlp.down_proj", "layers.1")
        False
        >>> matches("model.layers.10.mlp.down_proj", "layers.1*.down_proj")
        True
    """
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")


def apply_rules(names: Sequence[str], rules: Rules, default: int) -> dict[str, int]:
    """Return the bits of the layers that do not have `default` bits; of two rules the later wins.

    Args:
        names: Full names of all layers that are quantized.
        rules: From `parse_rules`.
        default: Bits of layers that no rule names.

    Raises:
        BitRuleError: no layer follows a rule.
    """
    exact = set(names)
    found: dict[str, int] = {}
    for pattern, bits in rules:
        named = [pattern] if pattern in exact else [n for n in names if matches(n, pattern)]
        if not named:
            inside = sorted({".".join(name.split(".")[-2:]) for name in names})
            raise BitRuleError(
                f"no layer that is quantized is named {pattern!r}, as --bits says; there are "
                f"{', '.join(inside[:12])}; embedding and head have --embed-bits and --head-bits"
            )
        found.update(dict.fromkeys(named, bits))
    return {name: bits for name, bits in found.items() if bits != default}


def described(bits: Iterable[int]) -> str:
    """Return the widths of a model's layers in words.

    Example:
        >>> described([2, 2, 2, 2]), described([4, 2, 2, 2])
        ('2', '2.5 (mixed: 2, 4)')
    """
    every = list(bits)
    kinds = sorted(set(every))
    if len(kinds) == 1:
        return str(kinds[0])
    mean = sum(every) / max(1, len(every))
    return f"{mean:.3g} (mixed: {', '.join(map(str, kinds))})"
