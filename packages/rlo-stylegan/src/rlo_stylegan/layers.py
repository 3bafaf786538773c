"""The layers of a patched checkout: `compat` first, `loss` on top, functions of the originals."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from rlo_core.files import remove_leftovers
from rlo_core.runs.folder import lock_folder

from rlo_stylegan.checkout import LOSS, RECORD, SCRIPT, Checkout
from rlo_stylegan.compat import repair_checkout
from rlo_stylegan.errors import ChangedError, CheckoutError
from rlo_stylegan.ledger import Ledger
from rlo_stylegan.refusals import reason
from rlo_stylegan.script import patch_script
from rlo_stylegan.sites import patch_loss

Layer = Literal["compat", "loss"]
LAYERS: tuple[str, ...] = get_args(Layer)


@dataclass(frozen=True)
class Plan:
    """What a command would do: the layers it leaves in force and each file before and after."""

    checkout: Checkout
    layers: tuple[str, ...]
    before: dict[str, bytes] = field(default_factory=dict)
    after: dict[str, bytes] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files that would change."""
        return [name for name in self.before if self.before[name] != self.after[name]]

    def diff(self) -> str:
        """Return the change as a unified diff; what is not UTF-8 is shown as replacements."""
        parts: list[str] = []
        for name in self.files:
            old, new = (
                side[name].decode("utf-8", errors="replace").splitlines(keepends=True)
                for side in (self.before, self.after)
            )
            for line in difflib.unified_diff(old, new, f"a/{name}", f"b/{name}"):
                parts.append(
                    line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
                )
        return "".join(parts)


def _patched(checkout: Checkout, ledger: Ledger, layers: Sequence[str]) -> dict[str, bytes]:
    """Return every file that differs from its original under some layers."""
    contents: dict[str, bytes] = {}
    if "compat" in layers:
        contents |= repair_checkout(checkout, ledger.original)
    if "loss" in layers:
        sources = {
            name: contents[name] if name in contents else ledger.original(name)
            for name in (LOSS, SCRIPT)
        }
        contents |= patch_sources(checkout, sources[LOSS], sources[SCRIPT])
    return contents


def patch_sources(checkout: Checkout, loss: bytes, script: bytes) -> dict[str, bytes]:
    """Return the two files of the layer `loss`, from their contents without it.

    Raises:
        CheckoutError: the code is not understood; the message says what was looked for and found.
    """
    try:
        patched = patch_loss(checkout, loss, script)
    except CheckoutError as error:
        why = reason(checkout)
        raise CheckoutError(f"{error}; {why}" if why else str(error)) from None
    return {LOSS: patched, SCRIPT: patch_script(script)}


def plan(checkout: Checkout, layers: Sequence[str]) -> Plan:
    """Return how to bring a checkout to exactly these layers; writes nothing.

    Raises:
        CheckoutError: its code is not understood.
        ChangedError: a patched file was edited since.
    """
    ledger = Ledger.load(checkout.root)
    ledger.check()
    wanted = tuple(layer for layer in LAYERS if layer in layers)
    if wanted == ledger.layers and ledger.coming is None:
        return Plan(checkout, wanted)
    contents = _patched(checkout, ledger, wanted)
    names = sorted({*ledger.files, *contents})
    return Plan(
        checkout,
        wanted,
        {name: checkout.read(name) for name in names},
        {name: contents[name] if name in contents else ledger.original(name) for name in names},
    )


def carry_out(planned: Plan) -> list[str]:
    """Write a plan; return the names of the files written.

    Raises:
        ChangedError: a file changed in the meantime.
        RunError: another process is changing the checkout; it is named.
    """
    checkout = planned.checkout
    with lock_folder(checkout.root / RECORD):
        ledger = Ledger.load(checkout.root)
        if planned.layers == ledger.layers and ledger.coming is None:
            ledger.close()  # of what an interruption at the very end may have left
            return []
        for name, content in planned.before.items():
            if checkout.read(name) != content:
                raise ChangedError(
                    f"{name} changed while the change was being planned; run it again"
                )
        for folder in sorted({(checkout.root / name).parent for name in planned.after}):
            remove_leftovers(folder, deep=False)
        return ledger.change(planned.layers, planned.after)
