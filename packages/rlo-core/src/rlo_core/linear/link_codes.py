"""Links as plain arguments: an operator that torch.compile keeps takes strings and floats."""

from __future__ import annotations

from weakref import WeakValueDictionary

from rlo_core.links import CE, DFT, GCE, Focal, Link, Poly1, Rooted, RootedConvex

_OWN: WeakValueDictionary[str, Link] = WeakValueDictionary()
"""Links of the user's own, by address; only eager calls use it, and look up what they put in."""


def is_built_in(link: Link) -> bool:
    """Whether the link can be written as a name and two numbers."""
    return type(link) in (CE, Rooted, RootedConvex, Focal, GCE, DFT, Poly1)


def encode(link: Link) -> tuple[str, float, float]:
    """Return a name and two numbers from which `decode` makes the same link."""
    if type(link) is CE:
        return "ce", 0.0, 0.0
    if type(link) is Rooted:
        return "rlo", link.k, link.multiplier
    if type(link) is RootedConvex:
        return "rlo-convex", link.k, link.multiplier
    if type(link) is Focal:
        return "focal", link.gamma, link.alpha
    if type(link) is GCE:
        return "gce", link.q, 0.0
    if type(link) is DFT:
        return "dft", 0.0, 0.0
    if type(link) is Poly1:
        return "poly1", link.eps, 0.0
    key = f"own-{id(link)}"
    _OWN[key] = link
    return key, 0.0, 0.0


def decode(name: str, a: float, b: float) -> Link:
    """Return the link that `encode` was given."""
    if name == "ce":
        return CE()
    if name == "rlo":
        return Rooted(a, None if b == a else b)
    if name == "rlo-convex":
        return RootedConvex(a, None if b == a else b)
    if name == "focal":
        return Focal(a, b)
    if name == "gce":
        return GCE(a)
    if name == "dft":
        return DFT()
    if name == "poly1":
        return Poly1(a)
    return _OWN[name]
