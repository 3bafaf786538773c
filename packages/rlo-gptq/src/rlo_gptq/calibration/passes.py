"""Which layers of a block are calibrated in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rlo_gptq.models.experts import SplitExperts

EXPERT_HESSIAN_BYTES = 1 << 30
"""Experts are calibrated together as far as their Hessians fit into this."""


def stages(block: nn.Module, groups: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Return groups that are calibrated in one pass: each alone, but experts of one kind together.

    A group alone needs one Hessian at a time. Experts are many and small; one pass over the
    calibration data for each of them would cost more than their Hessians do.
    """
    planned: list[list[Sequence[str]]] = []
    experts: dict[tuple[str, str], list[Sequence[str]]] = {}
    for group in groups:
        where = _experts_of(block, group[0])
        if where is None:
            planned.append([group])
            continue
        key = (where, group[0].rpartition(".")[2])
        if key not in experts:
            experts[key] = []
        experts[key].append(group)
    # gate_up before down: in their alphabetical order down would come first.
    for _, members in sorted(experts.items(), key=lambda item: (item[0][0], item[0][1] == "down")):
        size = 8 * linear_of(block, members[0][0]).in_features ** 2
        step = max(1, EXPERT_HESSIAN_BYTES // size)
        planned += [members[start : start + step] for start in range(0, len(members), step)]
    return planned


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return a layer of a block by its name inside the block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # the layout names nothing else
    return linear


def _experts_of(block: nn.Module, name: str) -> str | None:
    """Return the path of the expert list that a layer is in, or None."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if isinstance(block.get_submodule(path), SplitExperts):
            return path
    return None
