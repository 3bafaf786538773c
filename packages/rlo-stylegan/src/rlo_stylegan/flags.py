"""What a patched `train.py` calls: its flags become options of the loss class."""

from __future__ import annotations

import sys

from rlo_core.errors import RLOError

from rlo_stylegan.spec import gan_spec, notice

OPTIONS = (
    ("--loss", "GAN loss: ce, rlo, rlo-convex, rlo-bounded, focal or a spec such as focal:gamma=2"),
    ("--kparam", "k of a rooted loss (2 where it is left out)"),
    ("--mparam", "m of a rooted loss (k where it is left out)"),
)
"""The flags that a train.py gains, with their help."""


def resolve(loss: str, kparam: float | None, mparam: float | None) -> str:
    """Return the recorded spec of some flags.

    Raises:
        RLOError: there is no such GAN loss.
    """
    from rlo_stylegan.criterion import gan_link

    spec = gan_spec(loss, kparam=kparam, mparam=mparam)
    gan_link(spec)
    said = notice(spec, loss)
    if said is not None:
        print(f"rlo-stylegan: {said}", file=sys.stderr)
    return str(spec)


def gan_loss_kwargs(
    loss: str = "ce", kparam: float | None = None, mparam: float | None = None
) -> dict[str, str]:
    """Return `{"gan_loss": SPEC}` for `loss_kwargs`, and so for `training_options.json`.

    Called by a patched train.py: a mistake in the flags is one line on stderr and exit status 2.
    """
    try:
        return {"gan_loss": resolve(loss, kparam, mparam)}
    except RLOError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
