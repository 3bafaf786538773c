r"""The training objective, :math:`\sum_i w_i\text{link}(ce_i) + \tfrac{\lambda}{2}\|W\|^2`.

Weights are normalised to sum to one. Everything pointwise follows from the link's three derivatives
and those of cross entropy, with :math:`D = \partial ce/\partial z` (residuals) and :math:`z = WX^T
+ b`:

    gradient          X^T [w link'(ce) D]
    Hessian product   X^T [w (link''(ce) <D, v> D + link'(ce) (diag p - p p^T) v)],   v = V X^T
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import issparse

from rlo_core.linear_model.root import Array, Root


class Objective:
    """Value, gradient and Hessian products of a penalised linear model, memoised at the last point.

    Scores are kept as (rows, samples), one row for two classes and one per class otherwise: sums
    over classes then run over the long axis, where NumPy is vectorised.

    Args:
        X: Dense or CSR matrix, (N, d), float32 or float64.
        codes: Class of each sample, (N), integers in [0, classes).
        classes: Number of classes, >= 2; two have one row of coefficients.
        weight: Sample weights, (N), >= 0, or None.
        root: The link.
        l2: Strength of the L2 penalty on the coefficients (not the intercept), >= 0.
        fit_intercept: Whether the last column of the parameters is an intercept.
    """

    def __init__(
        self,
        X: Any,
        codes: Array,
        *,
        classes: int,
        weight: Array | None,
        root: Root,
        l2: float,
        fit_intercept: bool,
    ) -> None:
        self.X: Any = X
        self.sparse: bool = issparse(X)
        self.codes = codes
        self.classes = classes
        self.root = root
        self.l2 = l2
        self.fit_intercept = fit_intercept
        n = X.shape[0]
        self.weight: Array | float = 1.0 / n if weight is None else weight / weight.sum()
        self.sign = np.where(codes == 1, 1.0, -1.0).astype(X.dtype) if classes == 2 else None
        self.samples = np.arange(n)
        self.rows = 1 if classes == 2 else classes
        self.shape = (self.rows, X.shape[1] + int(fit_intercept))
        self._last: Point | None = None

    def scores(self, parameters: Array) -> Array:
        """Return W X^T + b, (rows, N), for `parameters` of `shape`."""
        parameters = parameters.astype(self.X.dtype, copy=False)
        W = parameters[:, :-1] if self.fit_intercept else parameters
        z: Array = (self.X @ W.T).T if self.sparse else W @ self.X.T
        if self.fit_intercept:
            z = z + parameters[:, -1:]
        return z

    def project(self, pointwise: Array) -> Array:
        """Return the transpose of `scores`: (rows, N) to an array of `shape`."""
        out = np.empty(self.shape)
        end = self.X.shape[1]
        if self.sparse:
            out[:, :end] = (self.X.T @ pointwise.T).T
        else:
            out[:, :end] = pointwise @ self.X
        if self.fit_intercept:
            out[:, -1] = pointwise.sum(axis=1, dtype=np.float64)
        return out

    def penalised(self, parameters: Array) -> Array:
        """Return the parameters with the intercept set to zero: what the penalty sees."""
        if not self.fit_intercept:
            return parameters
        kept = parameters.copy()
        kept[:, -1] = 0.0
        return kept

    def at(self, w: Array) -> Point:
        """Return the objective at the flat parameter vector `w`, (rows * columns)."""
        if self._last is None or not np.array_equal(self._last.w, w):
            self._last = Point(self, w.copy())
        return self._last


class Point:
    """The objective at one parameter vector; gradient and Hessian products only when asked for."""

    def __init__(self, objective: Objective, w: Array) -> None:
        self.objective = objective
        self.w = w
        self.parameters = w.reshape(objective.shape)
        z = objective.scores(self.parameters)
        if objective.sign is not None:
            z *= objective.sign
            e = np.exp(-np.abs(z))
            ce = (np.log1p(e) - np.minimum(z, 0.0))[0]
            # d softplus(-t)/dt = -sigmoid(-t), written without overflow for either sign of t.
            self.residual = np.where(z > 0.0, e, 1.0) / (e + 1.0) * -objective.sign
        else:
            z -= z.max(axis=0)
            own = z[objective.codes, objective.samples]
            np.exp(z, out=z)
            total = z.sum(axis=0)
            ce = np.log(total) - own
            z /= total
            z[objective.codes, objective.samples] -= 1.0
            self.residual = z
        # own = 0 and total = 1 + tiny may round to -0 or below.
        value, self.slope, self.curvature = objective.root.derivatives(np.maximum(ce, 0.0))
        weight = objective.weight
        fit = (
            float(np.sum(value, dtype=np.float64)) * weight
            if isinstance(weight, float)
            else float(np.dot(value.astype(np.float64, copy=False), weight))
        )
        self.value: float = fit
        if objective.l2:
            W = objective.penalised(self.parameters)
            self.value += 0.5 * objective.l2 * float(np.vdot(W, W))

    @cached_property
    def gradient(self) -> Array:
        """Gradient, flat, float64."""
        o = self.objective
        gradient = o.project(self.residual * (self.slope * o.weight).astype(o.X.dtype, copy=False))
        if o.l2:
            gradient += o.l2 * o.penalised(self.parameters)
        return gradient.ravel()

    def hessian_product(self, direction: Array) -> Array:
        """Hessian times a flat direction, flat, float64."""
        o = self.objective
        v = o.scores(direction.reshape(o.shape))
        along = (self.residual * v).sum(axis=0)
        if o.sign is not None:
            miss = np.abs(self.residual)
            curved = miss * (1.0 - miss) * v
        else:
            p = self.residual.copy()
            p[o.codes, o.samples] += 1.0
            curved = p * (v - (p * v).sum(axis=0))
        pointwise = self.curvature * along * self.residual + self.slope * curved
        product = o.project((pointwise * o.weight).astype(o.X.dtype, copy=False))
        if o.l2:
            product += o.l2 * o.penalised(direction.reshape(o.shape))
        return product.ravel()
