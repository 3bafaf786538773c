"""From an objective to its minimiser: SciPy's L-BFGS-B and Newton-CG, proximal gradient descent.

SciPy has no plain or accelerated gradient descent, which the paper's experiments are about, so "gd"
and "agd" are here: proximal gradient with backtracking, and the same with Nesterov's momentum and
restarts (Beck and Teboulle 2009; O'Donoghue and Candes 2015).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from scipy import optimize
from scipy.sparse.linalg import LinearOperator, cg

from rlo_core.linear_model.objective import Objective
from rlo_core.linear_model.root import Array

Solver = Literal["lbfgs", "newton-cg", "gd", "agd"]
SOLVERS: tuple[str, ...] = get_args(Solver)
_PAIRS, _FEWEST_PAIRS, _PAIR_BYTES = 30, 10, 1 << 28
"""L-BFGS's memory. 30 steps need a third fewer passes over 100,000 x 100 than SciPy's 10; models so
wide that they would fill more than 256 MiB keep SciPy's."""
_LINE_SEARCH = 50  # scikit-learn's maxls: SciPy's 20 is too few for badly scaled tables


@dataclass
class Solution:
    """What a solver found: flat parameters, iterations, and the objective after each of them."""

    w: Array
    iterations: int
    converged: bool
    message: str
    curve: list[float] = field(default_factory=list)


def minimise(
    objective: Objective,
    start: Array,
    *,
    solver: Solver,
    l1: float,
    tol: float,
    max_iter: int,
) -> Solution:
    """Minimise the objective plus `l1` times the sum of absolute coefficients.

    Args:
        objective: The smooth part.
        start: Flat parameters to start from.
        solver: One of `SOLVERS`. "newton-cg" takes no L1 penalty.
        l1: Strength of the L1 penalty, >= 0; the intercept has none.
        tol: Stop once the largest absolute entry of the (projected) gradient is at most this.
        max_iter: Most iterations.
    """
    if max_iter == 0:  # SciPy's L-BFGS-B would still make one
        return Solution(start, 0, False, "no iterations were allowed")
    penalty = np.full(objective.shape, l1)
    if objective.fit_intercept:
        penalty[:, -1] = 0.0
    if solver == "lbfgs":
        return _lbfgs(objective, start, penalty.ravel(), tol, max_iter)
    if solver == "newton-cg":
        return _newton_cg(objective, start, tol, max_iter)
    return _proximal_gradient(
        objective, start, penalty.ravel(), tol, max_iter, momentum=solver == "agd"
    )


def pairs_kept(size: int) -> int:
    """Return how many steps L-BFGS remembers, two float64 vectors of `size` each."""
    return min(_PAIRS, max(_FEWEST_PAIRS, _PAIR_BYTES // (16 * size)))


def _lbfgs(
    objective: Objective, start: Array, penalty: Array, tol: float, max_iter: int
) -> Solution:
    """L-BFGS-B; an L1 penalty makes it w = u - v with u, v >= 0, where the penalty is linear."""
    curve: list[float] = []
    split = bool(penalty.any())
    free = penalty == 0.0
    size = start.size

    def function(x: Array) -> tuple[float, Array]:
        if not split:
            point = objective.at(x)
            return point.value, point.gradient
        point = objective.at(x[:size] - x[size:])
        gradient = np.concatenate([point.gradient + penalty, penalty - point.gradient])
        gradient[size:][free] = 0.0
        return point.value + float(penalty @ (x[:size] + x[size:])), gradient

    def record(intermediate_result: optimize.OptimizeResult) -> None:
        curve.append(float(intermediate_result.fun))

    x0, bounds = start, None
    if split:
        x0 = np.concatenate(
            [np.where(free, start, np.maximum(start, 0.0)), np.maximum(-start, 0.0)]
        )
        x0[size:][free] = 0.0
        low = np.concatenate([np.where(free, -np.inf, 0.0), np.zeros(size)])
        high = np.concatenate([np.full(size, np.inf), np.where(free, 0.0, np.inf)])
        bounds = optimize.Bounds(low, high)
    result = optimize.minimize(
        function,
        x0,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=record,
        options={
            "maxiter": max_iter,
            "maxcor": pairs_kept(x0.size),
            "maxls": _LINE_SEARCH,
            "gtol": tol,
            "ftol": 64 * np.finfo(float).eps,
            "maxfun": _LINE_SEARCH * max(max_iter, 1),
        },
    )
    w = result.x[:size] - result.x[size:] if split else result.x
    # Status 2, a line search that finds nothing lower, is reached at the limit of float32's digits.
    return Solution(w, int(result.nit), bool(result.success), str(result.message), curve)


def _newton_cg(objective: Objective, start: Array, tol: float, max_iter: int) -> Solution:
    """SciPy's Newton-CG; it knows a step tolerance only, so the gradient is watched here."""
    curve: list[float] = []

    def watch(intermediate_result: optimize.OptimizeResult) -> None:
        point = objective.at(intermediate_result.x)
        curve.append(point.value)
        if np.abs(point.gradient).max() <= tol:
            raise StopIteration

    if np.abs(objective.at(start).gradient).max() <= tol:
        return Solution(start, 0, True, "gradient tolerance met at the start", curve)

    def value(w: Array) -> float:
        return objective.at(w).value

    def gradient(w: Array) -> Array:
        return objective.at(w).gradient

    def product(w: Array, v: Array) -> Array:
        return objective.at(w).hessian_product(v)

    result = optimize.minimize(
        value,
        start,
        jac=gradient,
        hessp=product,
        method="Newton-CG",
        callback=watch,
        options={"maxiter": max_iter, "xtol": 0.0},
    )
    return _polish(objective, result.x, int(result.nit), tol, max_iter, curve)


def _polish(
    objective: Objective, w: Array, iterations: int, tol: float, max_iter: int, curve: list[float]
) -> Solution:
    """Go on with Newton steps that are judged by the gradient, where the value has no digits left.

    SciPy's line search wants a lower value. Near a minimum that is rounding error long before the
    gradient is, so it stops, "successfully", at gradients of about 1e-8 to 1e-7.
    """
    size = float(np.abs(objective.at(w).gradient).max())
    while size > tol and iterations < max_iter:
        point = objective.at(w)
        hessian = LinearOperator((w.size, w.size), matvec=point.hessian_product, dtype=float)
        step, _ = cg(hessian, -point.gradient, rtol=1e-3, maxiter=2 * w.size)
        moved = w + step
        after = float(np.abs(objective.at(moved).gradient).max())
        if not after < 0.9 * size:
            return Solution(
                w, iterations, False,
                f"the gradient falls no further than {size:.1g} in the digits of X", curve,
            )  # fmt: skip
        w, size, iterations = moved, after, iterations + 1
        curve.append(objective.at(w).value)
    said = "gradient tolerance reached" if size <= tol else "iteration limit reached"
    return Solution(w, iterations, size <= tol, said, curve)


def _proximal_gradient(
    objective: Objective,
    start: Array,
    penalty: Array,
    tol: float,
    max_iter: int,
    *,
    momentum: bool,
) -> Solution:
    w, ahead, t = start, start, 1.0
    curve: list[float] = []
    point = objective.at(w)
    best = point.value + float(penalty @ np.abs(w))
    step = _first_step(objective, w)
    for iteration in range(1, max_iter + 1):
        point = objective.at(ahead)
        value, gradient = point.value, point.gradient
        previous = step
        step *= 1.2 if momentum else 2.0
        slack = 64 * np.finfo(float).eps * abs(value)
        while True:
            moved = ahead - step * gradient
            moved = np.sign(moved) * np.maximum(np.abs(moved) - step * penalty, 0.0)
            change = moved - ahead
            model = value + float(gradient @ change) + float(change @ change) / (2.0 * step)
            if objective.at(moved).value <= model + slack or step < 1e-20:
                break
            step *= 0.5
        now = objective.at(moved).value + float(penalty @ np.abs(moved))
        if momentum and now > best + slack and t > 1.0:
            ahead, t = w, 1.0  # the momentum points uphill: start it anew from the last good point
            curve.append(best)
            continue
        largest = float(np.abs(change).max()) / step
        # A step that grew must slow the momentum by as much (Scheinberg, Goldfarb and Bai 2014).
        grown = 0.5 * (1.0 + (1.0 + 4.0 * t * t * previous / step) ** 0.5)
        ahead = moved + (t - 1.0) / grown * (moved - w) if momentum else moved
        w, t, best = moved, grown, now
        curve.append(now)
        if largest <= tol:
            return Solution(w, iteration, True, "gradient tolerance reached", curve)
    return Solution(w, max_iter, False, "iteration limit reached", curve)


def _first_step(objective: Objective, w: Array) -> float:
    """Return one over the curvature along the gradient; backtracking does the rest."""
    point = objective.at(w)
    g = point.gradient
    curvature = float(g @ point.hessian_product(g))
    return float(g @ g) / curvature if curvature > 0.0 else 1.0
