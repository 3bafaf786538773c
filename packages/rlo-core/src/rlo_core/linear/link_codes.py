"""Links as plain arguments: an operator that torch.compile keeps takes strings and floats."""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import WeakValueDictionary

from rlo_core.links import BUILT_IN, CE, GCE, Link, Poly1, Rooted, RootedConvex

_OWN: WeakValueDictionary[str, Link] = WeakValueDictionary()
"""Links of the user's own, by address; only eager calls use it, and look up what they put in."""


def is_built_in(link: Link) -> bool:
    """Whether the link can be written as a name and two numbers."""
    return BUILT_IN.get(link.spec) is type(link)


def encode(link: Link) -> tuple[str, float, float]:
    """Return a name and two numbers from which `decode` makes the same link."""
    if is_built_in(link):
        a, b = (*link.numbers(), 0.0, 0.0)[:2]
        return link.spec, a, b
    key = f"own-{id(link)}"
    _OWN[key] = link
    return key, 0.0, 0.0


def decode(name: str, a: float, b: float) -> Link:
    """Return the link that `encode` was given."""
    if name not in BUILT_IN:
        return _OWN[name]
    kind = BUILT_IN[name]
    return kind.from_numbers(*(a, b)[: len(kind.__dataclass_fields__)])  # type: ignore[attr-defined]


def slope_is_bounded(link: Link) -> bool:
    """Whether a row's slope has a bound, so that a small softmax means a small gradient."""
    return is_built_in(link) and type(link) is not RootedConvex


class Exponential(NamedTuple):
    r"""A link as :math:`value = linear\,ce + factor\,(e^{-rate\,ce} - 1)`, for the kernels."""

    linear: float
    factor: float
    rate: float


def exponential(link: Link) -> Exponential | None:
    """Return the link in that form; None for one that has no such form."""
    if type(link) is CE:
        return Exponential(1.0, 0.0, 0.0)
    if type(link) in (Rooted, RootedConvex):
        k, m = link.numbers()
        if k == math.inf:
            return Exponential(1.0, 0.0, 0.0)
        return (
            Exponential(0.0, -m, 1.0 / k) if type(link) is Rooted else Exponential(0.0, m, -1.0 / k)
        )
    if type(link) is GCE:
        return Exponential(0.0, -1.0 / link.q, link.q)
    if type(link) is Poly1:
        return Exponential(1.0, -link.eps, 1.0)
    return None
