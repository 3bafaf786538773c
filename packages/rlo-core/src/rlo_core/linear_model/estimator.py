"""`RootedLogisticRegression`: scikit-learn's logistic regression with a rooted loss."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from rlo_core.linear_model._compat import (
    LinearClassifierMixin,
    SparseCoefMixin,
    check_sample_weight,
)
from rlo_core.linear_model.objective import Objective
from rlo_core.linear_model.root import Array, Form, Root
from rlo_core.linear_model.solvers import SOLVERS, Solver, minimise


class RootedLogisticRegression(LinearClassifierMixin, SparseCoefMixin, BaseEstimator):  # type: ignore[misc]
    r"""Minimises :math:`C\sum_i s_i\text{link}(ce_i) + \tfrac{1-\rho}{2}\|W\|_2^2 + \rho\|W\|_1`.

    The link is the convex rooted loss :math:`m(p_y^{-1/k}-1)` or the bounded
    :math:`m(1-p_y^{1/k})`; with k = inf it is `sklearn.linear_model.LogisticRegression`. Binary for
    two classes, multinomial for more; dense and CSR input. The convex form has one minimum for
    every k > 0, as logistic regression has. The bounded one may have several: the solver starts
    from zero and finds one of them.

    Args:
        k: Root, in (0, inf]. Smaller is further from cross entropy.
        m: Multiplier, > 0; None means k. It scales the loss against the penalty, as C does, and
            nothing else.
        form: "convex" (the paper's equation: samples far on the wrong side count more) or "bounded"
            (the released code: they count less, so mislabelled samples do little).
        C: Inverse strength of the penalty, in (0, inf]; inf is none.
        l1_ratio: rho, the L1 share of the penalty, in [0, 1].
        fit_intercept: Whether to fit an intercept; it is not penalised.
        solver: "lbfgs" (SciPy's L-BFGS-B), "newton-cg" (SciPy's; `l1_ratio` 0 only), "gd" or "agd"
            (proximal gradient descent with backtracking, plain or with Nesterov's momentum).
        max_iter: Most iterations, >= 0.
        tol: The largest absolute entry of the gradient of the mean objective at which to stop, >=
            0.
        class_weight: {class: weight}, "balanced" or None.
        warm_start: Whether `fit` starts from the last solution.
        n_jobs: No effect, as in `LogisticRegression`; there for code that sets it.
        random_state: No effect: every solver is deterministic.

    Attributes:
        classes_: The classes, (classes).
        coef_: Coefficients, (1, d) or (classes, d).
        intercept_: Intercepts, (1) or (classes).
        n_iter_: Iterations, (1).
        loss_curve_: The mean objective after each iteration.
        n_features_in_, feature_names_in_: As everywhere in scikit-learn.

    Source: Wang et al., AISTATS 2025, section on regression (`k`, `m` there too).
    """

    def __init__(
        self,
        k: float = 3.0,
        m: float | None = None,
        form: Form = "convex",
        *,
        C: float = 1.0,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        solver: Solver = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-4,
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
        warm_start: bool = False,
        n_jobs: int | None = None,
        random_state: int | None = None,
    ) -> None:
        self.k = k
        self.m = m
        self.form = form
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> RootedLogisticRegression:
        """Fit the coefficients.

        Args:
            X: (N, d), dense or sparse; float32 stays float32, everything else becomes float64.
            y: Classes, (N), of any kind that scikit-learn takes.
            sample_weight: (N), >= 0, or None for ones.

        Returns:
            The estimator.

        Raises:
            ValueError: an option out of its range, fewer than two classes, or what scikit-learn
                refuses.
        """
        root = self._check_options()
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C"
        )
        check_classification_targets(y)
        weight: Array | None = None
        if sample_weight is not None or self.class_weight is not None:
            weight = check_sample_weight(
                sample_weight, X, dtype=X.dtype, copy=True, ensure_non_negative=True
            )
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least two classes, got one class: {self.classes_[0]}")
        if self.class_weight is not None and weight is not None:
            per_class = compute_class_weight(
                self.class_weight, classes=self.classes_, y=y, sample_weight=weight
            )
            weight *= per_class[codes]
        total = float(X.shape[0] if weight is None else weight.sum())
        strength = 0.0 if math.isinf(self.C) else 1.0 / (self.C * total)
        objective = Objective(
            X,
            codes,
            classes=len(self.classes_),
            weight=weight,
            root=root,
            l2=strength * (1.0 - self.l1_ratio),
            fit_intercept=self.fit_intercept,
        )
        solution = minimise(
            objective,
            self._start(objective.shape),
            solver=self.solver,
            l1=strength * self.l1_ratio,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        if not solution.converged:
            warnings.warn(
                f"solver {self.solver!r} stopped after {solution.iterations} iterations before the "
                f"gradient was below tol={self.tol:g} ({solution.message}); "
                "raise max_iter or scale X",
                ConvergenceWarning,
                stacklevel=2,
            )
        parameters = solution.w.reshape(objective.shape).astype(X.dtype, copy=False)
        self.coef_ = parameters[:, : X.shape[1]].copy()
        self.intercept_ = (
            parameters[:, -1].copy() if self.fit_intercept else np.zeros(objective.rows, X.dtype)
        )
        self.n_iter_ = np.array([solution.iterations], dtype=np.int32)
        self.loss_curve_ = solution.curve
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, (N, classes), in the order of `classes_`."""
        check_is_fitted(self)
        scores = self.decision_function(X)
        if scores.ndim == 1:
            positive = expit(scores)
            return np.stack([1.0 - positive, positive], axis=1)
        return np.asarray(softmax(scores, axis=1))

    def predict_log_proba(self, X: Any) -> Array:
        """Return the logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def _start(self, shape: tuple[int, int]) -> Array:
        start = np.zeros(shape)
        if self.warm_start and hasattr(self, "coef_"):
            coef = self.coef_ if isinstance(self.coef_, np.ndarray) else self.coef_.toarray()
            width = shape[1] - int(self.fit_intercept)
            if coef.shape != (shape[0], width):
                raise ValueError(
                    f"coef_ must have shape {(shape[0], width)} for a warm start, got {coef.shape}"
                )
            start[:, :width] = coef
            if self.fit_intercept:
                start[:, -1] = self.intercept_
        return start.ravel()

    def _check_options(self) -> Root:
        _check_number("k", self.k)
        _check_number("C", self.C)
        _check_number("l1_ratio", self.l1_ratio)
        _check_number("tol", self.tol)
        if self.m is not None:
            _check_number("m", self.m)
        if not self.C > 0:
            raise ValueError(f"C must be positive, got {self.C}")
        if not 0.0 <= self.l1_ratio <= 1.0:
            raise ValueError(f"l1_ratio must be in [0, 1], got {self.l1_ratio}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.solver == "newton-cg" and self.l1_ratio != 0.0:
            raise ValueError(
                f"l1_ratio must be 0 for solver 'newton-cg', got {self.l1_ratio}; "
                "lbfgs, gd and agd take an L1 penalty"
            )
        if not _is(Integral, self.max_iter) or self.max_iter < 0:
            raise ValueError(f"max_iter must be an integer of at least 0, got {self.max_iter!r}")
        if not self.tol >= 0:
            raise ValueError(f"tol must be at least 0, got {self.tol}")
        return Root(self.k, self.m, self.form)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    if not _is(Real, value):
        raise ValueError(f"{name} must be a number, got {value!r}")
