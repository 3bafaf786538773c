r"""Terms that are added to a loss: an anchor to a reference model, or a teacher.

In a spec a term follows the loss and its gates: `dft+kl:beta=0.1` is anchored finetuning (ASFT),
`rlo:k=5+kl:beta=1,temperature=2` is distillation with a rooted loss on the hard labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlo_core.errors import SpecError
from rlo_core.functional import IGNORE_INDEX, Reduction


@dataclass(frozen=True)
class KL:
    r"""Divergence from a reference: :math:`\beta\,T^2\,KL(q_T\,\|\,p_T)`.

    q is the reference's distribution, p the model's, both with logits divided by T.

    Args:
        beta: Its weight, > 0.
        temperature: T, > 0; the factor T^2 keeps the gradient's size (Hinton et al., 2015).

    Source: arXiv 2509.23753 (ASFT: `dft+kl`); Hinton et al., "Distilling the Knowledge in a Neural
    Network", 2015 (a teacher).
    """

    beta: float = 0.1
    temperature: float = 1.0
    formula: ClassVar[str] = "beta T^2 KL(q_T || p_T)"

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def scale(self) -> float:
        """What multiplies the divergence of a row."""
        return self.beta * self.temperature**2


def create_term(name: str, options: dict[str, str]) -> KL:
    """Return the term that a spec names; an option without a name is its first.

    Raises:
        SpecError: an unknown name or option, or a value that the term refuses.
    """
    if name != "kl":
        raise SpecError(f"unknown term {name!r}; available: kl")
    given: dict[str, float] = {}
    for key, text in options.items():
        option = key or "beta"
        if option not in ("beta", "temperature"):
            raise SpecError(f"term 'kl' takes no option {option!r}; it takes beta, temperature")
        try:
            given[option] = float(text)
        except ValueError:
            raise SpecError(
                f"option {option!r} of term 'kl' must be a number, got {text!r}"
            ) from None
    try:
        return KL(**given)
    except ValueError as error:
        raise SpecError(f"term 'kl': {error}") from error


def kl_rows(logits: Tensor, reference: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`KL(q_T\,\|\,p_T)` of each row in nats, (N), float32 or wider.

    Args:
        logits: (N, C), which get a gradient.
        reference: (N, C), logits of the reference; a constant.
        temperature: T.

    Example:
        >>> round(float(kl_rows(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))[0]), 4)
        0.1109
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(work) / temperature).log_softmax(-1)
    log_q = (reference.detach().to(work) / temperature).log_softmax(-1)
    return nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


class AnchoredLoss(nn.Module):
    r"""Loss plus terms, :math:`loss + \beta T^2 KL(q_T\|p_T)`, given the reference's logits.

    It has no `link` of its own: a host that knows links only has to refuse it, and not to leave the
    terms out.

    Args:
        criterion: The loss, gates included.
        terms: At least one.
        ignore_index: Index targets with this value do not count.
        reduction: "mean" (over the kept targets, as for cross entropy), "sum" or "none".

    Example:
        >>> from rlo_core.modules import CELoss
        >>> loss = AnchoredLoss(CELoss(), [KL(beta=0.5)])
        >>> logits, reference = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> round(float(loss(logits, torch.tensor([1]), reference_logits=reference)), 4)
        0.7486
    """

    def __init__(
        self,
        criterion: nn.Module,
        terms: Sequence[KL],
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.criterion, self.terms = criterion, tuple(terms)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self, logits: Tensor, target: Tensor, *, reference_logits: Tensor | None = None
    ) -> Tensor:
        """Return the loss; `logits` (N, C) or (N, C, d1, ...), `target` without C, int64.

        Raises:
            SpecError: without `reference_logits`, (the shape of `logits`).
        """
        if reference_logits is None:
            raise SpecError(
                "a loss with '+kl' needs a reference model, and none was given; call it with "
                "reference_logits=, or use rlo_hf's trainers with reference_model="
            )
        kept = target != self.ignore_index
        rows, reference = logits.movedim(1, -1), reference_logits.movedim(1, -1)
        own: Tensor = self.criterion(logits, target)
        extra = sum(
            term.scale * kl_rows(rows[kept], reference[kept], temperature=term.temperature)
            for term in self.terms
        )
        assert isinstance(extra, Tensor)
        if self.reduction == "sum":
            return own + extra.sum()
        if self.reduction == "mean":
            return own + extra.mean()
        return own + torch.zeros_like(own).masked_scatter(kept, extra.to(own.dtype))

    def set_progress(self, progress: float) -> None:
        """Move the schedule of the criterion, if it has one."""
        move = getattr(self.criterion, "set_progress", None)
        if move is not None:
            move(progress)
