r"""The three terms of the non-saturating GAN loss, each :math:`\text{link}(\text{softplus}(x))`.

With D's logit `s`, the generator's term has x = -s on generated images, the discriminator's have x
= s on generated and x = -s on real images. `softplus(x)` is the cross entropy of that decision, so
any link applies; `ce` is `torch.nn.functional.softplus` itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from rlo_core._cross_entropy import apply_link
from rlo_core.errors import SpecError
from rlo_core.links import CE, Link
from rlo_core.modules import LinkLoss
from rlo_core.registry import LossSpec, create_loss, link_of
from torch import Tensor

from rlo_stylegan.spec import gan_spec, registered_spec

Site = Literal["G", "D_fake", "D_real"]
Report = Callable[[str, Tensor], object]

_HALF = (torch.float16, torch.bfloat16)


def gan_link(loss: str | LossSpec) -> Link:
    """Return the link of a GAN loss.

    Raises:
        SpecError: unknown, not a function of cross entropy, or with a schedule: a GAN's training
            loop does not tell its loss how far the run is.
    """
    spec = gan_spec(loss)
    criterion = create_loss(registered_spec(spec))
    link = link_of(criterion)
    if link is None or not isinstance(criterion, LinkLoss):
        raise SpecError(f"loss '{spec}' has no link, so it has no GAN form")
    schedule = getattr(criterion, "schedule", None)
    if schedule is not None and schedule.warmup > 0:
        raise SpecError(
            f"loss '{spec}' has a schedule, and a GAN's training loop does not tell its loss how "
            "far the run is; leave warmup out"
        )
    return link


class GanLoss:
    r"""A link of softplus: `loss(x, site)` is the loss of each logit, the shape of `x`.

    For `rlo-convex` this is :math:`k((1 + e^x)^{1/k} - 1)`, the authors' loss less the constant k.
    It goes through softplus, so no logit overflows it; the released form is inf from x = 88.7 on.

    Args:
        loss: A spec; `ce` is `torch.nn.functional.softplus`.
        report: `training_stats.report` of the checkout. With any loss but `ce` it is told, for each
            site, the cross entropy (`Loss/ce/SITE`, comparable between losses) and the slope of the
            link (`Loss/slope/SITE`, the factor on the gradient of cross entropy).

    Raises:
        SpecError: as `gan_link`.
    """

    def __init__(self, loss: str | LossSpec = "ce", *, report: Report | None = None) -> None:
        self.spec = gan_spec(loss)
        self.link = gan_link(self.spec)
        self.report = report

    def __call__(self, x: Tensor, site: Site) -> Tensor:
        """Return link(softplus(x)).

        Args:
            x: Minus the logits for "G" and "D_real", the logits for "D_fake"; floating, any shape.
                Half precision is computed in float32, and its gradient is held at the largest
                number of its dtype.
            site: Which of the three terms this is.

        Returns:
            The shape of `x`; float32 for half precision, except under `ce`, which keeps the dtype.
        """
        if type(self.link) is CE:
            return F.softplus(x)
        if x.dtype in _HALF:
            limit = torch.finfo(x.dtype).max
            x = x.float()
            if x.requires_grad:
                x.register_hook(lambda grad: grad.clamp(-limit, limit))  # type: ignore[no-untyped-call]
        ce = -F.logsigmoid(-x)  # softplus without its linear cut at 20
        if self.report is not None:
            with torch.no_grad():
                self.report(f"Loss/ce/{site}", ce)
                self.report(f"Loss/slope/{site}", self.link.slope(ce))
        return apply_link(ce, self.link)

    def __repr__(self) -> str:
        return f"GanLoss('{self.spec}')"
