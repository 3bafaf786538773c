r"""Any link as the objective of gradient-boosted trees: LightGBM, XGBoost and CatBoost.

A boosting library wants, for each row and class, the derivative of the loss by the raw score and
its curvature. With p the predicted probability and y the label (1 or 0 for each class):

    gradient  = link'(ce) (p - y)
    curvature = link'(ce) p (1 - p) + max(link''(ce), 0) (p - y)^2

The second term of the curvature is the link's own. A bounded link bends down (link'' < 0), and far
from a fit its whole curvature is negative, where a Newton step goes the wrong way. So what is
negative of it is left out: that is the Gauss-Newton curvature, never negative, and equal to the
true one where the link bends up, as `rlo-convex` does.

    >>> import numpy as np
    >>> objective = lgb_objective("ce")
    >>> gradient, curvature = objective(np.array([1, 0]), np.array([0.0, 0.0]))
    >>> gradient.tolist(), curvature.tolist()
    ([-0.5, 0.5], [0.25, 0.25])

Install one of `rlo-core[lightgbm]`, `rlo-core[xgboost]`, `rlo-core[catboost]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rlo_core.errors import SpecError
from rlo_core.registry import create_loss, link_of

if TYPE_CHECKING:
    from rlo_core.links import Link

Array = NDArray[np.float64]

__all__ = [
    "CatBoostObjective",
    "LightGBMObjective",
    "XGBoostObjective",
    "catboost_objective",
    "derivatives",
    "lgb_metric",
    "lgb_objective",
    "losses",
    "xgb_metric",
    "xgb_objective",
]


def boosting_link(spec: str) -> Link:
    """Return the link that a spec names.

    Raises:
        SpecError: an unknown loss, or one that is no function of cross entropy.
    """
    link = link_of(create_loss(spec))
    if link is None:
        raise SpecError(f"loss '{spec}' has no link, so trees cannot be boosted with it")
    return link


def _cross_entropy(scores: Array, target: ArrayLike) -> tuple[Array, Array, Array]:
    """Return ce (N), and probabilities and labels, both the shape of `scores`."""
    labels = np.asarray(target).astype(np.int64)
    if scores.ndim == 1:
        signed = np.where(labels == 1, scores, -scores)
        ce = np.logaddexp(0.0, -signed)
        return ce, np.exp(-np.logaddexp(0.0, -scores)), labels.astype(np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_p = shifted - log_total
    one_hot = np.zeros_like(scores)
    one_hot[np.arange(len(labels)), labels] = 1.0
    return -log_p[np.arange(len(labels)), labels], np.exp(log_p), one_hot


def losses(link: Link, scores: ArrayLike, target: ArrayLike) -> Array:
    """Return the loss of each row, (N), float64; arguments as `derivatives`."""
    ce, _, _ = _cross_entropy(np.asarray(scores, dtype=np.float64), target)
    return np.asarray(link.value(torch.from_numpy(ce)))


def derivatives(link: Link, scores: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    """Return gradient and curvature of each row's loss by its raw scores; see the module.

    Args:
        link: Any link.
        scores: Raw scores: (N) for two classes, of class 1; (N, C) for C classes.
        target: Class indices, (N), in [0, C).

    Returns:
        Two arrays of the shape of `scores`, float64; the second is nowhere negative. For C classes
        it is the diagonal.
    """
    ce, p, y = _cross_entropy(np.asarray(scores, dtype=np.float64), target)
    at = torch.from_numpy(ce).requires_grad_()
    with torch.enable_grad():
        slope = link.slope(at)
        bend = torch.zeros_like(at)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), at)
    first, second = slope.detach().numpy(), bend.clamp(min=0.0).numpy()
    if p.ndim == 2:
        first, second = first[:, None], second[:, None]
    miss = p - y
    return first * miss, first * p * (1.0 - p) + second * miss**2


class _Objective:
    """A picklable objective, called with (labels, raw scores[, weights])."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        boosting_link(spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    @staticmethod
    def _multiplier(classes: int) -> float:
        """What the library multiplies the curvature of one of C classes by."""
        raise NotImplementedError

    def _found(self, target: ArrayLike, scores: ArrayLike, weight: Any) -> tuple[Array, Array]:
        gradient, curvature = derivatives(boosting_link(self.spec), scores, target)
        if gradient.ndim == 2:
            curvature = curvature * self._multiplier(gradient.shape[1])
        if weight is not None and len(weight):
            factor = np.asarray(weight, dtype=np.float64)
            factor = factor[:, None] if gradient.ndim == 2 else factor
            gradient, curvature = gradient * factor, curvature * factor
        return gradient, curvature


class LightGBMObjective(_Objective):
    """An objective for `LGBMClassifier(objective=...)` and for `lgb.train({"objective": ...})`."""

    @staticmethod
    def _multiplier(classes: int) -> float:
        return classes / (classes - 1.0)  # LightGBM's own, after Friedman 2001

    def __call__(
        self, target: Any, scores: Any, weight: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Return gradient and curvature; `lgb.train` gives (scores, Dataset) instead."""
        if hasattr(scores, "get_label"):
            data, scores = scores, target
            target, weight = data.get_label(), data.get_weight()
            if scores.ndim == 1 and len(scores) != len(target):  # by class in older releases
                scores = scores.reshape(-1, len(target)).T
        return self._found(target, scores, weight)


class XGBoostObjective(_Objective):
    """An objective for `XGBClassifier(objective=...)` and for `xgboost.train(obj=...)`."""

    @staticmethod
    def _multiplier(classes: int) -> float:
        return 2.0  # XGBoost's own, which bounds the whole curvature matrix by its diagonal

    def __call__(
        self, target: Any, scores: Any, sample_weight: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Return gradient and curvature; `xgboost.train` gives (scores, DMatrix) instead."""
        if hasattr(scores, "get_label"):
            data, scores = scores, target
            target, sample_weight = data.get_label(), data.get_weight()
        gradient, curvature = self._found(target, scores, sample_weight)
        return gradient, np.maximum(curvature, 1e-16)  # as XGBoost's own objectives


class CatBoostObjective(_Objective):
    """An objective for `CatBoostClassifier(loss_function=..., eval_metric="Logloss")`.

    CatBoost asks for the derivatives of what is to be made large, so both have the other sign.
    """

    def calc_ders_range(
        self, approxes: Any, targets: Any, weights: Any
    ) -> list[tuple[float, float]]:
        """Return (first, second derivative) for each row of a two-class problem."""
        gradient, curvature = self._found(np.asarray(targets), np.asarray(approxes), weights)
        return list(zip((-gradient).tolist(), (-curvature).tolist(), strict=True))

    def calc_ders_multi(
        self, approxes: Any, target: float, weight: float | None
    ) -> tuple[list[float], list[list[float]]]:
        """Return the first derivatives of one row's classes, and the matrix of the second."""
        scores = np.asarray(approxes, dtype=np.float64)[None]
        gradient, curvature = derivatives(boosting_link(self.spec), scores, [int(target)])
        factor = 1.0 if weight is None else weight
        return (
            (-gradient[0] * factor).tolist(),
            np.diag(-curvature[0] * factor).tolist(),
        )


def lgb_objective(spec: str) -> LightGBMObjective:
    """Return a loss as LightGBM's objective: `LGBMClassifier(objective=lgb_objective("rlo:k=3"))`.

    Its estimator then predicts raw scores; `rlo_core.boosting_estimators.RootedLGBMClassifier`
    predicts classes and probabilities.

    Raises:
        SpecError: an unknown loss, or one that has no link.
    """
    return LightGBMObjective(spec)


def xgb_objective(spec: str) -> XGBoostObjective:
    """Return a loss as XGBoost's objective: `XGBClassifier(objective=xgb_objective("rlo:k=3"))`.

    Raises:
        SpecError: an unknown loss, or one that has no link.
    """
    return XGBoostObjective(spec)


def catboost_objective(spec: str) -> CatBoostObjective:
    """Return a loss as CatBoost's objective: `CatBoostClassifier(loss_function=...)`.

    Raises:
        SpecError: an unknown loss, or one that has no link.
    """
    return CatBoostObjective(spec)


class _Metric:
    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.__name__ = spec
        boosting_link(spec)

    def _mean(self, target: ArrayLike, scores: ArrayLike, weight: Any) -> float:
        each = losses(boosting_link(self.spec), scores, target)
        return float(np.average(each, weights=weight if weight is not None else None))


class _LightGBMMetric(_Metric):
    def __call__(
        self, target: ArrayLike, scores: ArrayLike, weight: ArrayLike | None = None
    ) -> tuple[str, float, bool]:
        return self.spec, self._mean(target, scores, weight), False


class _XGBoostMetric(_Metric):
    def __call__(
        self, target: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        return self._mean(target, scores, sample_weight)


def lgb_metric(spec: str) -> _LightGBMMetric:
    """Return a loss as LightGBM's `eval_metric`; of raw scores, as with our objective."""
    return _LightGBMMetric(spec)


def xgb_metric(spec: str) -> _XGBoostMetric:
    """Return a loss as XGBoost's `eval_metric`; of raw scores, as with our objective."""
    return _XGBoostMetric(spec)
