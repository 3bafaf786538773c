r"""Gates: a token's loss times a detached number that its own row of logits decides.

The objectives of 2025 and 2026 for finetuning are a link times a gate, :math:`g \cdot link(ce)`,
where g is a function of the row's statistics (the label's probability, the entropy, the rank of the
loss in the batch) through which no gradient goes. So a gate fits wherever a token's weight does: in
the fused linear loss it costs no logits. In a spec a gate follows its loss, `ce*eaft`,
`rlo:k=5*profit:tau=0.3`, and several multiply. A package adds one with an entry point in the group
`rlo_core.gates` that names a subclass of `Gate`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlo_core._cross_entropy import apply_link
from rlo_core._row_statistics import tile_statistics
from rlo_core.errors import SpecError
from rlo_core.functional import IGNORE_INDEX, Reduction, link_cross_entropy
from rlo_core.links import CE, Link


@dataclass(frozen=True)
class RowStatistics:
    """Numbers of each row, (N) each and without gradient; None where nobody asked.

    Attributes:
        ce: Cross entropy of the label, nats.
        entropy: Of the softmax, nats.
        top1: The largest probability.
        sum_sq: The sum of squared probabilities, in (0, 1].
        top_entropy: The entropy of the largest K probabilities made to sum to 1, nats.
        correct: 1 where the label is the most likely class.
        mean_logit: The mean of the logits.
        reference_ce: Cross entropy of the label under a reference model, nats.
        classes: C.
    """

    ce: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None
    sum_sq: Tensor | None = None
    top_entropy: Tensor | None = None
    correct: Tensor | None = None
    mean_logit: Tensor | None = None
    reference_ce: Tensor | None = None
    classes: int = 0

    @property
    def p(self) -> Tensor:
        """The probability of the label."""
        return torch.exp(-self.ce)

    def of(self, name: str) -> Tensor:
        """Return a statistic, or raise SpecError where the host cannot give it."""
        value = getattr(self, name)
        if value is None:
            raise SpecError(f"this host cannot give the statistic {name!r} that the loss needs")
        return value  # type: ignore[no-any-return]


class Gate(ABC):
    """A detached factor of each token's loss.

    Attributes:
        formula: As `rlo losses` shows it.
        source: Where it was published.
        needs: The statistics it is a function of, beside ce.
        whole: Whether it compares the rows of a batch, so that all must be known before any.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False

    @abstractmethod
    def factor(self, rows: RowStatistics) -> Tensor:
        """Return the factor of each row, (N), like `rows.ce`."""


@dataclass(frozen=True)
class EAFT(Gate):
    r"""Entropy-adaptive finetuning: :math:`(H_K / \ln K)^\alpha`, H_K the entropy of the top K.

    Tokens on which the model is sure, and wrong, are left alone. `norm` replaces ln K: 3.0 is what
    LLaMA-Factory divides by.

    Source: arXiv 2601.02151; LLaMA-Factory's `use_eaft_loss`.
    """

    alpha: float = 1.0
    k: int = 20
    norm: float | None = None
    formula = "(H_topK / ln K)^alpha"
    source = "arXiv 2601.02151"
    needs = ("top_entropy",)

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k must be at least 2, got {self.k}")

    def factor(self, rows: RowStatistics) -> Tensor:
        norm = math.log(self.k) if self.norm is None else self.norm
        return (rows.of("top_entropy") / norm).pow(self.alpha)


@dataclass(frozen=True)
class ProFit(Gate):
    r"""Probability-guided selection: :math:`[p > \tau]`.

    Only tokens that the model finds likely enough are trained on. Source: arXiv 2601.09195.
    """

    tau: float = 0.3
    formula = "[p > tau]"
    source = "arXiv 2601.09195"

    def factor(self, rows: RowStatistics) -> Tensor:
        return (rows.p > self.tau).to(rows.ce.dtype)


@dataclass(frozen=True)
class Threshold(Gate):
    r"""A band of probabilities: :math:`[low \le p \le high]`.

    Source: arXiv 2510.00526, which trains on the upper or the lower end.
    """

    low: float = 0.0
    high: float = 1.0
    formula = "[low <= p <= high]"
    source = "arXiv 2510.00526"

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"0 <= low < high <= 1 must hold, got {self.low} and {self.high}")

    def factor(self, rows: RowStatistics) -> Tensor:
        return ((rows.p >= self.low) & (rows.p <= self.high)).to(rows.ce.dtype)


@dataclass(frozen=True)
class Entropy(Gate):
    r"""Normalised entropy: :math:`(H / \ln C)^\alpha`, over all classes."""

    alpha: float = 1.0
    formula = "(H / ln C)^alpha"
    source = "arXiv 2601.02151, without its top-K shortcut"
    needs = ("entropy",)

    def factor(self, rows: RowStatistics) -> Tensor:
        return (rows.of("entropy") / math.log(max(rows.classes, 2))).pow(self.alpha)


@dataclass(frozen=True)
class DEFT(Gate):
    r"""Dynamic entropy finetuning: :math:`p^{\sum_c p_c^2}`, no parameter.

    On `ce` its gradient is that of the published :math:`(1 - p^a)/a`, a the detached concentration
    (its Renyi-2 entropy is -ln a); the value is another. Source: arXiv 2602.11424.
    """

    formula = "p^(sum p^2)"
    source = "arXiv 2602.11424"
    needs = ("sum_sq",)

    def factor(self, rows: RowStatistics) -> Tensor:
        return torch.exp(-rows.ce * rows.of("sum_sq"))


@dataclass(frozen=True)
class TopK(Gate):
    r"""The hardest tokens: 1/share for the `share` of the rows with the largest loss, 0 for others.

    1/share, so that the mean over all rows is the mean over the chosen ones. Ranks are those within
    one call: one batch of a process.
    """

    share: float = 0.6
    formula = "[rank of ce <= share N] / share"
    source = "arXiv 2404.07965, without its reference model"
    whole = True

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def score(self, rows: RowStatistics) -> Tensor:
        """What is ranked."""
        return rows.ce

    def factor(self, rows: RowStatistics) -> Tensor:
        score = self.score(rows)
        count = max(1, round(self.share * len(score))) if len(score) else 0
        chosen = torch.zeros_like(rows.ce)
        if count:
            chosen[score.topk(count).indices] = len(score) / count
        return chosen


@dataclass(frozen=True)
class Rho(TopK):
    r"""Rho-1's selection: as `topk`, ranked by the excess :math:`ce - ce_{ref}`.

    Needs the loss of each token under a reference model. Source: arXiv 2404.07965.
    """

    formula = "[rank of ce - ce_ref <= share N] / share"
    source = "arXiv 2404.07965"
    needs = ("reference_ce",)

    def score(self, rows: RowStatistics) -> Tensor:
        return rows.ce - rows.of("reference_ce")


def create_gate(name: str, options: dict[str, str]) -> Gate:
    """Return a registered gate; an option without a name is its first.

    Raises:
        SpecError: an unknown name or option, or a value that the gate refuses.
        PluginError: it does not import, or its name is claimed twice.
    """
    from rlo_core.plugins import GATES, load_plugin
    from rlo_core.registry import LossSpec, _annotation, _convert

    factory = load_plugin(GATES, name)
    if not (inspect.isclass(factory) and issubclass(factory, Gate)):
        raise SpecError(f"gate {name!r} must be a subclass of rlo_core.gates.Gate")
    takes = list(inspect.signature(factory).parameters)
    given: dict[str, Any] = {}
    for key, text in options.items():
        option = takes[0] if key == "" and takes else key
        if option not in takes:
            raise SpecError(
                f"gate {name!r} takes no option {key!r}; it takes {', '.join(takes) or 'none'}"
            )
        if option in given:
            raise SpecError(f"gate {name!r} is given option {option!r} twice")
        given[option] = _convert(
            LossSpec(name), option, text, _annotation(factory, option), kind="gate"
        )
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"gate {name!r}: {error}") from error


def needs_of(gates: Sequence[Gate]) -> tuple[str, ...]:
    """Return the statistics of logits that gates need, each once."""
    names = dict.fromkeys(name for gate in gates for name in gate.needs)
    return tuple(name for name in names if name != "reference_ce")


def top_of(gates: Sequence[Gate]) -> int:
    """Return the K of "top_entropy"; gates of one loss must agree on it."""
    found = {gate.k for gate in gates if isinstance(gate, EAFT)}
    if len(found) > 1:
        raise SpecError(f"gates of one loss must have one k, got {sorted(found)}")
    return found.pop() if found else 20


@torch.no_grad()
def row_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    needs: Sequence[str] = (),
    top: int = 20,
    reference_ce: Tensor | None = None,
) -> RowStatistics:
    """Return the statistics of rows of logits, with plain operations.

    Args:
        logits: (N, C).
        target: int64, (N).
        needs: Of "entropy", "top1", "sum_sq", "top_entropy", "correct", "mean_logit".
        top: K of "top_entropy".
        reference_ce: (N), handed on.

    Example:
        >>> rows = row_statistics(torch.zeros(2, 4), torch.tensor([0, 3]), needs=("entropy",))
        >>> [round(float(x), 4) for x in rows.entropy]
        [1.3863, 1.3863]
    """
    found = tile_statistics(logits.detach(), target, needs, top=top)
    return RowStatistics(**found, reference_ce=reference_ce, classes=logits.shape[-1])


def gate_factor(gates: Sequence[Gate], rows: RowStatistics) -> Tensor:
    """Return the product of the gates' factors, (N), without gradient."""
    factor = torch.ones_like(rows.ce)
    for gate in gates:
        factor = factor * gate.factor(rows).detach()
    return factor


class GatedLoss(nn.Module):
    r"""A link times gates, :math:`g \cdot link(ce)`, as a criterion `loss(logits, target)`.

    It has no `link` of its own: a host that knows links only has to refuse it, and not to leave the
    gates out.

    Args:
        criterion: A criterion with a link and without class weights or smoothing; the gates
            multiply its loss, and a schedule of its options goes on.
        gates: At least one.
        ignore_index: Index targets with this value do not count.
        reduction: "mean" (over the kept targets, as for cross entropy), "sum" or "none".

    Raises:
        SpecError: a criterion without a link, or with class weights or smoothing.

    Example:
        >>> from rlo_core.modules import CELoss
        >>> loss = GatedLoss(CELoss(), [ProFit(0.3)])
        >>> round(float(loss(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([1, 0]))), 4)
        0.0635
    """

    def __init__(
        self,
        criterion: nn.Module,
        gates: Sequence[Gate],
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        link = getattr(criterion, "link", None)
        if not isinstance(link, Link):
            raise SpecError(f"a gate needs a loss with a link, and {criterion} has none")
        smoothing: float = getattr(criterion, "label_smoothing", 0.0)
        if getattr(criterion, "weight", None) is not None or smoothing:
            raise SpecError("a loss with gates takes no class weights and no label smoothing")
        self.criterion, self.gates = criterion, tuple(gates)
        self.ignore_index, self.reduction = ignore_index, reduction
        top_of(self.gates)

    @property
    def gated_link(self) -> Link:
        """The link in force; a schedule moves it."""
        return self.criterion.link  # type: ignore[return-value]

    def forward(
        self, logits: Tensor, target: Tensor, *, reference_ce: Tensor | None = None
    ) -> Tensor:
        """Return the loss; `logits` (N, C) or (N, C, d1, ...), `target` without C, int64."""
        if logits.dim() < 2:
            logits, target = logits.unsqueeze(0), target.unsqueeze(0)
        shape = target.shape
        logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        target = target.reshape(-1)
        loss = torch.zeros(len(target), dtype=torch.promote_types(logits.dtype, torch.float32),
                           device=logits.device)  # fmt: skip
        kept = target != self.ignore_index
        reference = None if reference_ce is None else reference_ce.reshape(-1)[kept]
        part, labels = logits[kept], target[kept]
        ce = link_cross_entropy(part, labels, CE(), reduction="none")
        rows = row_statistics(
            part,
            labels,
            needs=needs_of(self.gates),
            top=top_of(self.gates),
            reference_ce=reference,
        )
        gated = apply_link(ce, self.gated_link) * gate_factor(self.gates, rows)
        if self.reduction == "sum":
            return gated.sum()
        if self.reduction == "mean":
            return gated.mean()
        return loss.masked_scatter(kept, gated.to(loss.dtype)).reshape(shape)

    def set_progress(self, progress: float) -> None:
        """Move the schedule of the criterion, if it has one."""
        move = getattr(self.criterion, "set_progress", None)
        if move is not None:
            move(progress)
