"""LightGBM's and XGBoost's classifiers with a loss of this family; scikit-learn's interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlo_core.boosting import lgb_objective, xgb_objective

try:
    from lightgbm import LGBMClassifier
except ModuleNotFoundError:  # then only the other class can be made
    LGBMClassifier = object
try:
    from xgboost import XGBClassifier
except ModuleNotFoundError:
    XGBClassifier = object

__all__ = ["RootedLGBMClassifier", "RootedXGBClassifier"]


class RootedLGBMClassifier(LGBMClassifier):  # type: ignore[misc]
    """`lightgbm.LGBMClassifier` whose objective is a loss of this family.

    Begins at the classes' shares, as LightGBM's own objectives do, so that with `loss="ce"` it is
    LightGBM's model.

    Args:
        loss: A spec, `"rlo:k=3"`, any registered name that has a link.
        **kwargs: As `lightgbm.LGBMClassifier`, but for `objective`.

    Raises:
        SpecError: in `fit`, for an unknown loss or one that has no link.
        ModuleNotFoundError: without the package lightgbm.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> x, y = load_breast_cancer(return_X_y=True)
        >>> model = RootedLGBMClassifier("rlo:k=3", n_estimators=20, verbose=-1).fit(x, y)
        >>> model.predict_proba(x[:2]).shape
        (2, 2)
    """

    objective: Any

    def __init__(self, loss: str = "rlo:k=3", **kwargs: Any) -> None:
        _require(LGBMClassifier, "lightgbm")
        super().__init__(**kwargs)
        self.loss = loss

    def fit(
        self, X: Any, y: Any, sample_weight: ArrayLike | None = None, **kwargs: Any
    ) -> RootedLGBMClassifier:
        """Fit; arguments as `lightgbm.LGBMClassifier.fit`."""
        self.start_ = _start(np.asarray(y), sample_weight)
        init = np.broadcast_to(self.start_, (len(y), *np.shape(self.start_))).copy()
        self.objective = lgb_objective(self.loss)
        try:
            with self._loss_hidden():
                super().fit(X, y, sample_weight=sample_weight, init_score=init, **kwargs)
        finally:
            self.objective = None
        return self

    @contextmanager
    def _loss_hidden(self) -> Iterator[None]:
        self._is_loss_hidden = True
        try:
            yield
        finally:
            del self._is_loss_hidden

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters; to LightGBM itself not `loss`, a name that it has for its own."""
        params: dict[str, Any] = super().get_params(deep)
        if getattr(self, "_is_loss_hidden", False):
            params.pop("loss", None)
        return params

    def decision_function(self, X: Any) -> Any:
        """Return raw scores: (N) of the second class, or (N, C)."""
        return self.predict_proba(X, raw_score=True)

    def predict_proba(self, X: Any, raw_score: bool = False, **kwargs: Any) -> Any:
        """Return probabilities, (N, C)."""
        with self._loss_hidden():
            scores = super().predict_proba(X, raw_score=True, **kwargs) + self.start_
        return scores if raw_score else _probabilities(scores)

    def predict(self, X: Any, **kwargs: Any) -> Any:
        """Return the most likely class of each row, (N)."""
        return self.classes_[self.predict_proba(X, **kwargs).argmax(axis=1)]


class RootedXGBClassifier(XGBClassifier):  # type: ignore[misc]
    """`xgboost.XGBClassifier` whose objective is a loss of this family.

    Args:
        loss: A spec, `"rlo:k=3"`, any registered name that has a link.
        **kwargs: As `xgboost.XGBClassifier`, but for `objective`.

    Raises:
        SpecError: in `fit`, for an unknown loss or one that has no link.
        ModuleNotFoundError: without the package xgboost.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> x, y = load_breast_cancer(return_X_y=True)
        >>> model = RootedXGBClassifier("rlo:k=3", n_estimators=20).fit(x, y)
        >>> model.predict_proba(x[:2]).shape
        (2, 2)
    """

    objective: Any

    def __init__(self, loss: str = "rlo:k=3", **kwargs: Any) -> None:
        _require(XGBClassifier, "xgboost")
        super().__init__(**kwargs)
        self.loss = loss

    def get_xgb_params(self) -> dict[str, Any]:
        """Return XGBoost's own parameters; `loss` is none of them."""
        params: dict[str, Any] = super().get_xgb_params()
        params.pop("loss", None)
        return params

    def fit(self, X: Any, y: Any, **kwargs: Any) -> RootedXGBClassifier:
        """Fit; arguments as `xgboost.XGBClassifier.fit`."""
        self.objective = xgb_objective(self.loss)
        try:
            super().fit(X, y, **kwargs)
        finally:
            self.objective = None
        return self


def _require(base: type, package: str) -> None:
    if base is object:
        raise ModuleNotFoundError(
            f"this estimator needs {package}; install it with: pip install 'rlo-core[{package}]'"
        )


def _start(y: Any, weight: ArrayLike | None) -> Any:
    """Return the raw scores that give every row the classes' shares."""
    classes, index = np.unique(y, return_inverse=True)
    share = np.bincount(index, weights=None if weight is None else np.asarray(weight, float))
    log_share = np.log(share / share.sum())
    return log_share[1] - log_share[0] if len(classes) == 2 else log_share


def _probabilities(scores: Any) -> Any:
    if scores.ndim == 1:
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
