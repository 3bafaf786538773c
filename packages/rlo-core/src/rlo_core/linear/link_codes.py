"""Links as plain arguments: an operator that torch.compile keeps takes strings and floats."""

from __future__ import annotations

from weakref import WeakValueDictionary

from rlo_core.links import BUILT_IN, Link

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
