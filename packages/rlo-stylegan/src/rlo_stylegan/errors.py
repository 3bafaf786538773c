"""What `rlo-stylegan` refuses."""

from __future__ import annotations

from rlo_core.errors import RLOError


class CheckoutError(RLOError):
    """A checkout that is not there, or whose code is not of a shape that is understood."""


class ChangedError(RLOError):
    """A file of the checkout is not what the last `apply` or `revert` left."""
