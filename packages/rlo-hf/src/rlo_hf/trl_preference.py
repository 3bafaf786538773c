r"""TRL's preference and policy trainers: our output layer, and a link on the logistic term.

Preference losses are binary cross entropies of a margin, :math:`-\log\sigma(x)`, and a link makes
:math:`link(-\log\sigma(x))` of each: `rlo:k=2` bounds what a pair can cost that is labelled the
wrong way round, `rlo-convex` weighs it more. Everything else of a step stays TRL's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch.nn.functional as F
from rlo_core._cross_entropy import apply_link
from rlo_core.errors import RLOError
from rlo_core.links import Link
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer as HostDPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer as HostGRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer as HostKTOTrainer

from rlo_hf.linear_path import Linear
from rlo_hf.objective import Loss, Objective
from rlo_hf.schedule import ScheduleCallback
from rlo_hf.self_check import SelfCheckError, who_is_in_the_place
from rlo_hf.trl_head import kernel, log_prob_kernel, reason_against


class _Functional:
    """torch.nn.functional with one function in the place of its own."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        self.__dict__[name] = function

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


@contextmanager
def _functional(module: Any, name: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `F.name` of a module be another function inside the block."""
    names = vars(module)
    before = names["F"]
    names["F"] = _Functional(name, function)
    try:
        yield
    finally:
        names["F"] = before


class PreferenceMixin:
    """The slot, for subclasses of TRL's trainers; see `DPOTrainer`."""

    _TERM: ClassVar[str] = ""
    """The function of torch.nn.functional that the host's logistic term is written with."""
    loss_objective: Objective | None = None
    linear_path: str = ""

    def __init__(
        self,
        *args: Any,
        loss: Loss | None = None,
        check: bool = True,
        linear: Linear = "auto",
        **kwargs: Any,
    ) -> None:
        _objective_of(loss)
        super().__init__(*args, **kwargs)
        self.open_slot(loss, check=check, linear=linear)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = inspect.signature(PreferenceMixin.__init__).parameters
        more = [p for p in own.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        hosts = [base for base in cls.__mro__ if base.__module__.startswith("trl.")]
        if hosts and cls.__module__.startswith("rlo_hf."):
            theirs = list(inspect.signature(hosts[0]).parameters.values())
            cls.__signature__ = inspect.Signature([*theirs, *more])  # type: ignore[attr-defined]

    @property
    def _host(self) -> Any:
        return self

    def open_slot(
        self, loss: Loss | None = None, *, check: bool = True, linear: Linear = "auto"
    ) -> None:
        """Put head and loss in a trainer that is made; arguments as `DPOTrainer`."""
        host = self._host
        if linear not in ("auto", "fused", "off"):
            raise ValueError(f"linear must be 'auto', 'fused' or 'off', got {linear!r}")
        self.loss_objective = _objective_of(loss)
        if self.loss_objective is not None:
            self._refuse_other_terms()
            host.add_callback(ScheduleCallback(self.loss_objective))
        reason = "linear='off'" if linear == "off" else reason_against(host.args, gathers=True)
        reason = reason or self._reason_against()
        if reason is not None and linear == "fused":
            raise RLOError(f"linear='fused' is not possible: {reason}")
        self.linear_path = "fused" if reason is None else f"TRL's kernel ({reason})"
        self._pending, self._asked = check and self.loss_objective is not None, 0

    def _reason_against(self) -> str | None:
        """Why TRL's own kernel stays in this kind of trainer."""
        return None

    def _refuse_other_terms(self) -> None:
        """Raise RLOError for settings without a logistic term."""

    @property
    def _module(self) -> Any:
        """The host's module, where its step looks for `F`."""
        hosts = [base for base in type(self).__mro__ if base.__module__.startswith("trl.")]
        return sys.modules[hosts[0].__module__]

    def _linked(self, x: Tensor) -> Tensor:
        """Return what stands in the place of the host's function of a margin."""
        raise NotImplementedError

    def _link_of(self, x: Tensor) -> Tensor:
        r"""Return :math:`link(-\log\sigma(x))`."""
        self._asked += 1
        assert self.loss_objective is not None
        link: Link | None = self.loss_objective.link
        assert link is not None
        return apply_link(F.softplus(-x), link)

    def _head(self) -> Any:
        return kernel(log_prob_kernel) if self.linear_path == "fused" else nullcontext()

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Do TRL's step with our head, and the link on its logistic term."""
        term: Any = nullcontext()
        if self.loss_objective is not None:
            term = _functional(self._module, self._TERM, self._linked)
        with self._head(), term:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Do TRL's step; after the first, see that the loss took part in it."""
        if not self._pending:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._asked = 0
        value = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._pending = False
        if not self._asked:
            assert self.loss_objective is not None
            raise SelfCheckError(
                f"the loss that is propagated is not {self.loss_objective.name}: "
                f"{who_is_in_the_place(self._host, 'passes the loss slot by')}"
            )
        return value


_LOGISTIC = ("sigmoid", "sigmoid_norm", "robust", "bco_pair", "nca_pair", "aot", "aot_unpaired")


class _WithReference(PreferenceMixin):
    """For trainers that can compute the reference's log-probabilities before training."""

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """Do TRL's, with our head."""
        with self._head():
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]


class DPOSlot(_WithReference):
    """The slot of `DPOTrainer`, for any subclass of TRL's."""

    _TERM = "logsigmoid"

    def _linked(self, x: Tensor) -> Tensor:
        return -self._link_of(x)

    def _refuse_other_terms(self) -> None:
        types = self._host.loss_types
        kinds = [kind for kind in types if kind != "sft"]
        other = [kind for kind in kinds if kind not in _LOGISTIC]
        if other or not kinds:
            got = (other or types)[0]
            raise RLOError(
                f"loss_type={got!r} has no logistic term for a loss to act on; "
                f"{', '.join(_LOGISTIC)} have one"
            )
        if self._host.f_divergence_type == "js_divergence":
            raise RLOError(
                "f_divergence_type='js_divergence' has a logarithm of its own where the loss acts; "
                "leave loss out, or take another divergence"
            )


class DPOTrainer(DPOSlot, HostDPOTrainer):
    r"""TRL's DPOTrainer with our output layer, and a link on its logistic term.

    TRL's loss of a pair is :math:`-\log\sigma(\beta\Delta)`, with :math:`\Delta` the difference of
    the log ratios of the chosen and the rejected completion. With `loss` it is
    :math:`link(-\log\sigma(\beta\Delta))`; `loss="ce"` and None are TRL's own.

    Args:
        model: As TRL's, and so all arguments but those below.
        loss: A spec, a criterion or its class, with a link; None leaves TRL's term. Every
            :math:`-\log\sigma` of `loss_type` sigmoid, sigmoid_norm, robust, bco_pair, nca_pair,
            aot and aot_unpaired takes it; "sft" beside them stays cross entropy.
        check: Whether the first step must have used the loss.
        linear: "auto" computes log-probabilities by our output layer where that is possible,
            "fused" raises where it is not, "off" keeps TRL's. `trainer.linear_path` says which.

    Raises:
        RLOError: a loss without a link, or with gates, class weights or smoothing; a `loss_type` or
            `f_divergence_type` without a logistic term of its own.
    """


class KTOSlot(_WithReference):
    """The slot of `KTOTrainer`, for any subclass of TRL's."""

    _TERM = "sigmoid"

    def _linked(self, x: Tensor) -> Tensor:
        return 1 - self._link_of(x)

    def _refuse_other_terms(self) -> None:
        kind = self._host.loss_type
        if kind != "kto":
            raise RLOError(f"a loss needs loss_type='kto', got {kind!r}")


class KTOTrainer(KTOSlot, HostKTOTrainer):
    r"""TRL's KTOTrainer with our output layer, and a link on its logistic term.

    TRL's loss of a completion is :math:`1-\sigma(x)`, x the log ratio over the reference point, or
    its negative for an undesirable one. With `loss` it is :math:`link(-\log\sigma(x))`:
    `rlo:k=1` is TRL's own, as is None; `ce` is the logistic loss, `rlo:k=5` lies between.

    Args:
        model: As TRL's, and so all arguments but those below.
        loss: A spec, a criterion or its class, with a link; None leaves TRL's term.
        check: As `DPOTrainer`.
        linear: As `DPOTrainer`.

    Raises:
        RLOError: as `DPOTrainer`; a `loss_type` other than "kto".
    """


class GRPOSlot(PreferenceMixin):
    """The slot of `GRPOTrainer`, for any subclass of TRL's."""

    def _refuse_other_terms(self) -> None:
        raise RLOError(
            "GRPO's objective is no function of cross entropy and takes no loss; without one "
            "this trainer is TRL's with our output layer"
        )

    def _reason_against(self) -> str | None:
        bonus = self._host._entropy_bonus_enabled
        return "the entropy bonus needs a gradient of the entropy" if bonus else None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self._head():
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                *args, **kwargs
            )


class GRPOTrainer(GRPOSlot, HostGRPOTrainer):
    """TRL's GRPOTrainer with our output layer; its objective stays as it is.

    Args:
        model: As TRL's, and so all arguments but those below.
        loss: None. A policy gradient has no cross entropy that a loss could be a function of.
        check: Not used.
        linear: As `DPOTrainer`; with an entropy bonus TRL's kernel stays, whose entropy has a
            gradient.

    Raises:
        RLOError: a loss.
    """


def _objective_of(loss: Loss | None) -> Objective | None:
    """Return the loss with its link, which stays None for none.

    Raises:
        RLOError: it has no link, or class weights, smoothing or gates.
    """
    if loss is None:
        return None
    objective = Objective(loss)
    if objective.link is None:
        raise RLOError(
            f"loss {objective.name!r} has no link, and a margin has no logits; it must be a "
            "function of cross entropy"
        )
    if objective.weight is not None or objective.label_smoothing or objective.gates:
        raise RLOError(
            f"class weights, label smoothing and gates need logits, and {objective.name!r} acts on "
            "a margin"
        )
    return objective
