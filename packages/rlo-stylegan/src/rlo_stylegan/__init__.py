"""rlo-stylegan: `apply` and `revert`, loaded when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlo_stylegan.patching import Change as Change
    from rlo_stylegan.patching import apply as apply
    from rlo_stylegan.patching import revert as revert

__version__ = "0.1.0"
__all__ = ["Change", "apply", "revert"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rlo_stylegan import patching

        return getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
