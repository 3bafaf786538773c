"""The least that makes a checkout of 2021 run on the installed Python and packages.

Each repair is a small codemod that asks the installed packages whether it is needed, says in one
line why, and touches nothing else. Together they are the layer `compat`, separate from the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper

from rlo_stylegan.checkout import Checkout, parse
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.repairs import REPAIRS, Repair


@dataclass(frozen=True)
class Repaired:
    """One place that a repair changes."""

    name: str
    line: int
    repair: type[Repair]


def needed_repairs() -> list[type[Repair]]:
    """Return the repairs that the installed packages call for."""
    return [repair for repair in REPAIRS if repair.needed()]


def repair(
    source: bytes, name: str, repairs: Sequence[type[Repair]]
) -> tuple[bytes, list[Repaired]]:
    """Return a file with some repairs made, and where.

    Raises:
        CheckoutError: it does not parse.
    """
    wanted = [kind for kind in repairs if kind.pattern.search(source)]
    if not wanted:
        return source, []
    module: cst.Module = parse(source, name)
    places: list[Repaired] = []
    for kind in wanted:
        transformer = kind(module)
        module = MetadataWrapper(module, unsafe_skip_copy=True).visit(transformer)
        places += [Repaired(name, line, kind) for line in transformer.lines]
    return module.bytes, places


def repair_checkout(checkout: Checkout, original: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return every file of a checkout that the needed repairs change, repaired.

    Args:
        checkout: The checkout.
        original: Gives the content of a file without any layer.
    """
    repairs = needed_repairs()
    contents: dict[str, bytes] = {}
    for name in checkout.sources():
        source = original(name)
        try:
            repaired, places = repair(source, name, repairs)
        except CheckoutError:  # a file that is not Python 3 is the doctor's to report
            continue
        if places:
            contents[name] = repaired
    return contents
