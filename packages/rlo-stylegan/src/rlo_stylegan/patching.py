"""`apply` and `revert` as functions, for those who patch checkouts from Python."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlo_stylegan.checkout import Checkout, find_checkout
from rlo_stylegan.layers import Layer, carry_out, plan
from rlo_stylegan.ledger import Ledger


@dataclass(frozen=True)
class Change:
    """What was done to a checkout, or would be.

    Attributes:
        checkout: The folder with train.py.
        family: What the checkout looks like, e.g. "stylegan2-ada-pytorch".
        layers: What is in force afterwards: "compat", "loss", both or nothing.
        files: The files that differ before and after; names have forward slashes.
        written: Those that were written; empty for a dry run.
        diff: The change as a unified diff.
    """

    checkout: Path
    family: str
    layers: tuple[str, ...]
    files: tuple[str, ...]
    written: tuple[str, ...]
    diff: str


def apply(
    checkout: str | os.PathLike[str], *, compat: bool = False, dry_run: bool = False
) -> Change:
    """Give a checkout's train.py the options `--loss`, `--kparam` and `--mparam`.

    Args:
        checkout: The folder of train.py, one around it, or train.py itself.
        compat: Make the repairs of `rlo-stylegan doctor --compat` as well.
        dry_run: Write nothing.

    Returns:
        What was done.

    Raises:
        CheckoutError: there is no checkout, or its code is not understood; nothing is written.
        ChangedError: a file on record was edited since.
        RunError: another process is changing the checkout.
        OSError: a file cannot be written; the same call, or `revert`, goes on from there.

    Example:
        change = rlo_stylegan.apply("stylegan3", dry_run=True)
        print(change.diff)
    """
    found = find_checkout(checkout)
    in_force = Ledger.load(found.root).layers
    return bring(found, {*in_force, "loss", *(["compat"] if compat else [])}, dry_run=dry_run)


def revert(
    checkout: str | os.PathLike[str], *, only: Layer | None = None, dry_run: bool = False
) -> Change:
    """Give back every byte that `apply` changed, or one of its two layers.

    Args:
        checkout: As `apply`.
        only: "loss" or "compat" takes back that one; None both.
        dry_run: Write nothing.

    Returns:
        What was done.

    Raises:
        CheckoutError, ChangedError, RunError, OSError: as `apply`.
    """
    found = find_checkout(checkout)
    in_force = Ledger.load(found.root).layers
    left = {layer for layer in in_force if only is not None and layer != only}
    return bring(found, left, dry_run=dry_run)


def bring(checkout: Checkout, layers: Iterable[str], *, dry_run: bool) -> Change:
    """Bring a checkout to exactly these layers."""
    planned = plan(checkout, sorted(layers))
    written = [] if dry_run else carry_out(planned)
    return Change(
        checkout.root,
        checkout.family(),
        planned.layers,
        tuple(planned.files),
        tuple(written),
        planned.diff(),
    )
