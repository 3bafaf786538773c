"""What a host gives to a comparison: one training run at a time, measured on held-out samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from rlo_core.errors import RLOError


class CompareError(RLOError):
    """A comparison that cannot be made: the data, the budget or the study say why."""


class DivergedError(RLOError):
    """A run whose loss or weights became infinite or NaN; the comparison counts it and goes on."""


class Task(ABC):
    """One data set and one recipe, trained with a loss, a rate and a seed at a time.

    With the same seed all losses see the same split, the same first weights and the same order:
    runs are paired by seed.

    Attributes:
        host: The word after `rlo compare`.
        rate_name: What is tuned for each loss: "lr", or "C" for a linear model.
        rates: The grid of it, ascending.
        default: Where in the grid every loss begins.
        overlap: Held-out samples over training samples where each seed draws another split, 0 where
            all seeds have the same held-out samples. Overlapping splits widen the intervals.
        metrics: The figures that a verdict is given on.
        criterion: What held-out samples judge a loss by, unless the user says otherwise.
    """

    host: ClassVar[str]
    rate_name: str = "lr"
    rates: tuple[float, ...]
    default: int
    overlap: float = 0.0
    metrics: tuple[str, ...] = ("accuracy", "ce", "ece", "ece_scaled")
    criterion: str = "symmetric"

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what makes a study another one: data, model, options; JSON values."""

    @abstractmethod
    def check(self, loss: str) -> None:
        """Raise SpecError for a loss that this host cannot train with."""

    @abstractmethod
    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        """Train once, and return `rlo_core.compare.measures.Held.result()` of held-out samples.

        Where there are samples with labels that are trusted, their result is in it as `trusted`.

        Raises:
            DivergedError: the run did.
        """

    @abstractmethod
    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        """Train with everything there is, save the model in `out`, return what it came to."""
