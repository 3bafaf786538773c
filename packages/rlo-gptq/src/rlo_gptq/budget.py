"""How large a model may become; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

PROBE_TOKENS = 1024
"""Over which each layer's effect on the output is averaged."""


@dataclass(frozen=True)
class Budget:
    """How large the weight files may be: one of the two is given.

    Args:
        bytes: Of the files.
        average_bits: As many bytes as the files would have if all layers had this many bits, and
            embedding and head those that are recommended.

    Raises:
        ValueError: both are given, or none.
    """

    bytes: int | None = None
    average_bits: float | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.average_bits is None):
            raise ValueError("a budget must have either bytes or average_bits")

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"--bytes {self.bytes}"
        return f"--average-bits {self.average_bits:g}"
