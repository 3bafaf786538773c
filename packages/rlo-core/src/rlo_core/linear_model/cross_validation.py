"""`RootedLogisticRegressionCV`: C and k by held-out samples whose labels may be wrong."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from rlo_core.linear_model._compat import check_sample_weight
from rlo_core.linear_model.estimator import RootedLogisticRegression
from rlo_core.linear_model.root import Array, Form

Criterion = Literal["symmetric", "accuracy", "likelihood"]
CRITERIA: tuple[str, ...] = ("symmetric", "accuracy", "likelihood")


class RootedLogisticRegressionCV(RootedLogisticRegression):
    r"""`RootedLogisticRegression` whose C and k are chosen by cross-validation.

    The criterion is the mean over held-out samples of 1 - p of the label ("symmetric"), which
    ranks models alike with and without evenly wrong labels (Ghosh et al., 2017); of their errors
    ("accuracy"); or of -log p ("likelihood"), which is for labels that are right. Then all samples
    are fitted with what was best.

    Args:
        ks: The roots to choose from, each in (0, inf]; inf is logistic regression.
        Cs: The inverse strengths of the penalty to choose from.
        cv: Folds, an integer of at least 2 (stratified), or a splitter of scikit-learn's.
        criterion: "symmetric", "accuracy" or "likelihood".
        form: "convex" or "bounded"; see `RootedLogisticRegression`.
        l1_ratio: As there.
        fit_intercept: As there.
        solver: As there.
        max_iter: As there.
        tol: As there.
        class_weight: As there.

    Attributes:
        k_: The root that was chosen.
        C_: The inverse strength that was chosen.
        scores_: The criterion, lower is better, (ks, Cs, folds).
        classes_, coef_, intercept_, n_iter_, loss_curve_: Of the fit with all samples.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = RootedLogisticRegressionCV(ks=(1.0, 3.0), Cs=(0.1, 1.0), cv=3).fit(X, y)
        >>> model.scores_.shape
        (2, 2, 3)
    """

    def __init__(
        self,
        ks: tuple[float, ...] = (1.43, 3.0, 8.0, float("inf")),
        *,
        Cs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0),
        cv: Any = 5,
        criterion: Criterion = "symmetric",
        form: Form = "bounded",
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        solver: Literal["lbfgs", "newton-cg", "gd", "agd"] = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-4,
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
    ) -> None:
        self.ks = ks
        self.Cs = Cs
        self.cv = cv
        self.criterion = criterion
        self.form = form
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> RootedLogisticRegressionCV:
        """Choose k and C, and fit; arguments as `RootedLogisticRegression.fit`.

        Raises:
            ValueError: an option out of its range, fewer than two classes, or no class with as many
                samples as there are folds.
        """
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}"
            )
        for name in ("ks", "Cs"):
            if len(getattr(self, name)) == 0:
                raise ValueError(f"{name} must have at least one value, got none")
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C"
        )
        check_classification_targets(y)
        weight: Array | None = None
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, X, ensure_non_negative=True)
        classes, counts = np.unique(y, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"y must have at least two classes, got one class: {classes[0]}")
        folds = self.cv
        # A single small class costs a warning of scikit-learn's, as everywhere there.
        if isinstance(folds, (int, np.integer)) and counts.max() < folds:
            raise ValueError(
                f"cv={folds} needs {folds} samples of each class, got {counts.min()} of "
                f"{classes[counts.argmin()]}"
            )
        splits = list(check_cv(folds, y, classifier=True).split(X, y))
        self.scores_ = np.empty((len(self.ks), len(self.Cs), len(splits)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for fold, (train, held) in enumerate(splits):
                self._score_fold(X, y, weight, train, held, fold)
        mean = self.scores_.mean(axis=2)
        row, column = np.unravel_index(int(mean.argmin()), mean.shape)
        self.k_, self.C_ = self.ks[row], self.Cs[column]
        best = self._model(self.k_, self.C_).fit(X, y, sample_weight=weight)
        for name in ("classes_", "coef_", "intercept_", "n_iter_", "loss_curve_"):
            setattr(self, name, getattr(best, name))
        return self

    def _model(self, k: float, C: float) -> RootedLogisticRegression:
        return RootedLogisticRegression(
            k=k,
            form=self.form,
            C=C,
            l1_ratio=self.l1_ratio,
            fit_intercept=self.fit_intercept,
            solver=self.solver,
            max_iter=self.max_iter,
            tol=self.tol,
            class_weight=self.class_weight,
        )

    def _score_fold(
        self, X: Any, y: Array, weight: Array | None, train: Array, held: Array, fold: int
    ) -> None:
        for row, k in enumerate(self.ks):
            for column, C in enumerate(self.Cs):
                model = clone(self._model(k, C))
                inside = None if weight is None else weight[train]
                model.fit(X[train], y[train], sample_weight=inside)
                p = model.predict_proba(X[held])
                codes = np.searchsorted(model.classes_, y[held]).clip(0, p.shape[1] - 1)
                known = model.classes_[codes] == y[held]
                own = np.where(known, p[np.arange(len(held)), codes], 0.0)
                if self.criterion == "symmetric":
                    each = 1.0 - own
                elif self.criterion == "accuracy":
                    each = (p.argmax(axis=1) != codes) | ~known
                else:
                    each = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
                outside = None if weight is None else weight[held]
                if outside is not None and outside.sum() == 0:
                    outside = None
                self.scores_[row, column, fold] = np.average(each, weights=outside)
