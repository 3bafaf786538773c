"""From probes and a size to the bits of every unit; and the curve over all sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlo_core.errors import RLOError

from rlo_gptq.allocation.knapsack import InfeasibleError, solve
from rlo_gptq.allocation.probes import Probes
from rlo_gptq.allocation.units import EMBEDDING, HEAD, Unit, Units
from rlo_gptq.budget import Budget

_ROUNDS = 16


class BudgetError(RLOError):
    """A size that no choice of bits fits."""


@dataclass(frozen=True)
class Allocation:
    """The bits of every unit.

    Args:
        bits: By the unit's name.
        bytes: Of the weight files, headers and all.
        kl: The predicted divergence to the dense model, in nats a token.
    """

    bits: dict[str, int]
    bytes: int
    kl: float


def smallest(units: Units) -> dict[str, int]:
    """Return the choice with the smallest files."""
    return {u.name: min(u.bytes, key=lambda b: u.bytes[b]) for u in units.units}


def largest(units: Units) -> dict[str, int]:
    """Return the choice with the largest files."""
    return {u.name: max(u.bytes, key=lambda b: u.bytes[b]) for u in units.units}


def budget_bytes(units: Units, budget: Budget) -> int:
    """Return the bytes that the files of a model may have.

    An average between two widths is between the sizes of the two uniform models.
    """
    if budget.bytes is not None:
        return budget.bytes
    assert budget.average_bits is not None
    every = sorted({bits for unit in units.units if unit.layers for bits in unit.bytes})
    low = max([b for b in every if b <= budget.average_bits], default=every[0])
    high = min([b for b in every if b >= budget.average_bits], default=every[-1])
    small, large = (units.file_bytes(units.uniform(bits)) for bits in (low, high))
    if low == high:
        return small
    return int(small + (large - small) * (budget.average_bits - low) / (high - low))


def check_budget(units: Units, budget: Budget) -> int:
    """Return the budget in bytes.

    Raises:
        BudgetError: not even the smallest choice fits; says how large that is.
    """
    wanted = budget_bytes(units, budget)
    least = units.file_bytes(smallest(units))
    if least > wanted:
        raise BudgetError(
            f"{budget} must leave {least / 1e6:.2f} MB for the smallest bits of every layer, got "
            f"{wanted / 1e6:.2f} MB; give --bytes {least} or more"
        )
    return wanted


def allocate(units: Units, probes: Probes, budget: int) -> Allocation:
    """Return the choice with the least predicted divergence whose files fit.

    Sizes of tensors are exact in the knapsack; the files' headers, whose length depends on the
    choice by some bytes, are measured of each solution until one fits.

    Raises:
        BudgetError: none fits.
    """
    least = units.file_bytes(smallest(units))
    beside = least - sum(min(u.bytes.values()) for u in units.units)
    limit = budget - beside
    groups = [
        [(size, probes.loss(unit.name, bits)) for bits, size in unit.bytes.items()]
        for unit in units.units
    ]
    for _ in range(_ROUNDS):
        try:
            chosen = solve(groups, limit)
        except InfeasibleError:
            break
        bits = {unit.name: list(unit.bytes)[i] for unit, i in zip(units.units, chosen, strict=True)}
        size = units.file_bytes(bits)
        if size <= budget:
            return Allocation(bits, size, predicted(units, probes, bits))
        limit -= size - budget
    bits = smallest(units)
    if least > budget:
        raise BudgetError(f"files must have at least {least} bytes, got {budget}")
    return Allocation(bits, least, predicted(units, probes, bits))


def predicted(units: Units, probes: Probes, bits: dict[str, int]) -> float:
    """Return the predicted divergence of a choice, in nats a token."""
    return sum(probes.loss(unit.name, bits[unit.name]) for unit in units.units)


def curve(units: Units, probes: Probes, *, points: int) -> list[Allocation]:
    """Return the best choices over sizes from the smallest to the largest, evenly spaced."""
    low, high = units.file_bytes(smallest(units)), units.file_bytes(largest(units))
    sizes = [low + (high - low) * i // max(1, points - 1) for i in range(points)]
    found: dict[int, Allocation] = {}
    for size in sizes:
        allocation = allocate(units, probes, size)
        found[allocation.bytes] = allocation
    return [found[size] for size in sorted(found)]


def uniform_points(units: Units, probes: Probes) -> list[dict[str, Any]]:
    """Return sizes and predictions of models whose layers all have the same bits."""
    every = sorted({bits for unit in units.units if unit.layers for bits in unit.bytes})
    found = []
    for bits in every:
        choice = units.uniform(bits)
        size = units.file_bytes(choice)
        kl = predicted(units, probes, choice)
        found.append({"bits": bits, "bytes": size, "predicted_kl": kl})
    return found


def by_kind(units: Units, probes: Probes, bits: dict[str, int]) -> list[dict[str, Any]]:
    """Return a row for each kind of layer: mean bits, bytes, predicted divergence."""
    kinds: dict[str, list[Unit]] = {}
    for unit in units.units:
        kinds.setdefault(unit.kind if unit.layers else unit.name, []).append(unit)
    rows = []
    for kind in sorted(kinds, key=lambda k: k in (EMBEDDING, HEAD)):
        members = kinds[kind]
        weights = sum(unit.weights for unit in members)
        rows.append(
            {
                "kind": kind,
                "bits": sum(bits[u.name] * u.weights for u in members) / weights,
                "widths": _counts([bits[u.name] for u in members]),
                "bytes": sum(u.bytes[bits[u.name]] for u in members),
                "kl": sum(probes.loss(u.name, bits[u.name]) for u in members),
            }
        )
    return rows


def mean_bits(units: Units, bits: dict[str, int]) -> float:
    """Return the mean bits of a layer's code, embedding and head aside."""
    layers = [unit for unit in units.units if unit.layers]
    return sum(bits[u.name] * u.weights for u in layers) / sum(u.weights for u in layers)


def _counts(widths: Sequence[int]) -> str:
    return ", ".join(f"{widths.count(b)} x {b}" for b in sorted(set(widths)))
