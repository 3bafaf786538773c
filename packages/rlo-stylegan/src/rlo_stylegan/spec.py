"""From the flags of a GAN's train.py to one spec string, without importing torch.

In the authors' GAN code `rlo` is the convex form with k = 2, while in the rest of the suite (and in
the authors' training code) `rlo` is the bounded form. Here a flag means what it means to a GAN
user, and what is recorded is never ambiguous:

    --loss ce                     ce             torch's softplus, untouched
    --loss rlo                    rlo-convex:k=2 the authors' GAN loss less a constant
    --loss rlo --kparam 4         rlo-convex:k=4
    --loss rlo-bounded            rlo-bounded:k=2 what the rest of the suite calls `rlo`
    --loss focal:gamma=2          focal:gamma=2  any registered loss that has a link
"""

from __future__ import annotations

from rlo_core.registry import LossSpec, parse_spec

GAN_K = 2.0
"""k of the authors' GAN runs; `rlo-core` alone would take 3."""

_CONVEX, _BOUNDED = "rlo-convex", "rlo-bounded"


def gan_spec(
    loss: str | LossSpec = "ce", *, kparam: float | None = None, mparam: float | None = None
) -> LossSpec:
    """Return the recorded form of a GAN loss; giving it back to this function changes nothing.

    Args:
        loss: A name or spec; `rlo` reads as `rlo-convex`, and k is 2 where it is left out.
        kparam: k of a rooted loss, > 0.
        mparam: m of a rooted loss, > 0; k where it is left out.

    Raises:
        SpecError: malformed, or an option given twice with different values.
    """
    spec = parse_spec(loss)
    if spec.name == "rlo":
        spec = LossSpec(_CONVEX, spec.options)
    if kparam is not None:
        spec = spec.with_options(k=float(kparam))
    if mparam is not None:
        spec = spec.with_options(m=float(mparam))
    if spec.name in (_CONVEX, _BOUNDED) and "k" not in spec.options:
        spec = LossSpec(spec.name, {"k": f"{GAN_K:g}", **spec.options})
    return spec


def registered_spec(spec: LossSpec) -> LossSpec:
    """Return the spec under which `rlo_core.registry` knows a recorded GAN loss."""
    return LossSpec("rlo", spec.options) if spec.name == _BOUNDED else spec


def notice(spec: LossSpec, asked: str) -> str | None:
    """Return what a user should be told about the loss that `asked` became, or None."""
    if spec.name == _CONVEX and parse_spec(asked).name == "rlo":
        return (
            f"loss {asked!r} is {spec}, the convex form, as in the authors' GAN code; "
            "the bounded form is 'rlo-bounded'"
        )
    if spec.name in (_BOUNDED, "gce", "dft"):
        return (
            f"loss '{spec}' is bounded: its gradient vanishes for a generator that is confidently "
            "beaten; watch Loss/slope/G in stats.jsonl, or take 'rlo-convex'"
        )
    return None
