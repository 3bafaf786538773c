"""Why a checkout has no place for the loss: the reason behind "found no softplus"."""

from __future__ import annotations

import re

from rlo_stylegan.checkout import LOSS, Checkout

_HINGE = re.compile(rb"relu\(\s*(torch\.ones_like\(\w+\)|1(\.0?)?)\s*[-+]")
_RELATIVISTIC = re.compile(rb"softplus\(\s*-?\s*(\w*[Rr]elativistic\w*)\s*\)")


def reason(checkout: Checkout) -> str:
    """Return why the loss that the checkout has instead is none for us, "" where it is unknown."""
    if _HINGE.search(checkout.read(LOSS)):
        return (
            "its discriminator loss is a hinge, relu(1 - logits) and relu(1 + logits), as in "
            "projected-gan, stylegan-xl and stylegan-t: that is no function of cross entropy, so a "
            "rooted loss has nothing to replace"
        )
    for name in checkout.sources():
        if _RELATIVISTIC.search(checkout.read(name)):
            return (
                f"its loss is relativistic ({name}): softplus of the difference of a real and a "
                "generated logit, as in R3GAN, and not the cross entropy of one decision, so the "
                "rooted loss of the paper does not apply"
            )
    return ""
