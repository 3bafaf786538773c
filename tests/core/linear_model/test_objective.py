"""Value, gradient and Hessian product against the torch losses of rlo_core in float64."""

import numpy as np
import pytest
import torch
from rlo_core.functional import (
    binary_rooted_convex_loss,
    binary_rooted_loss,
    rooted_convex_loss,
    rooted_loss,
)
from rlo_core.linear_model.objective import Objective
from rlo_core.linear_model.root import CONVEX_LINEAR_FROM, Root
from rlo_core.links import CONVEX_LINEAR_FROM as TORCH_LINEAR_FROM
from rlo_core.links import Rooted, RootedConvex
from scipy.sparse import csr_array

BINARY = {"convex": binary_rooted_convex_loss, "bounded": binary_rooted_loss}
MULTI = {"convex": rooted_convex_loss, "bounded": rooted_loss}
LINKS = {"convex": RootedConvex, "bounded": Rooted}


def oracle(w, X, codes, weight, classes, form, k, m, l2, fit_intercept):
    """The same objective in torch, through the losses that networks are trained with."""
    rows = 1 if classes == 2 else classes
    W = w.reshape(rows, -1)
    coef = W[:, :-1] if fit_intercept else W
    z = X @ coef.T + (W[:, -1] if fit_intercept else 0.0)
    if classes == 2:
        loss = BINARY[form](z[:, 0], codes.double(), k=k, m=m, reduction="none")
    else:
        loss = MULTI[form](z, codes, k=k, m=m, reduction="none")
    return (loss * weight).sum() / weight.sum() + 0.5 * l2 * (coef**2).sum()


@pytest.mark.parametrize("form", ["convex", "bounded"])
@pytest.mark.parametrize(("k", "m"), [(1.0, None), (3.0, 10.0), (float("inf"), None)])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("matrix", [np.asarray, csr_array])
def test_value_gradient_and_hessian_product_are_those_of_the_torch_loss(
    form, k, m, classes, fit_intercept, matrix
):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 5)) * (rng.random((30, 5)) < 0.6)
    codes = rng.integers(0, classes, 30)
    weight = rng.random(30)
    objective = Objective(
        matrix(X),
        codes,
        classes=classes,
        weight=weight,
        root=Root(k, m, form),
        l2=0.3,
        fit_intercept=fit_intercept,
    )
    w = rng.normal(size=objective.shape).ravel()
    v = rng.normal(size=w.size)

    def function(at):
        return oracle(
            at,
            torch.tensor(X),
            torch.tensor(codes),
            torch.tensor(weight),
            classes,
            form,
            k,
            m,
            0.3,
            fit_intercept,
        )

    at = torch.tensor(w, requires_grad=True)
    value = function(at)
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ torch.tensor(v), at)
    point = objective.at(w)
    assert point.value == pytest.approx(value.item(), rel=1e-12)
    np.testing.assert_allclose(point.gradient, gradient.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(point.hessian_product(v), product, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["convex", "bounded"])
@pytest.mark.parametrize(("k", "m"), [(0.5, None), (3.0, 3.0), (8.0, 10.0), (float("inf"), None)])
def test_the_numpy_link_is_the_torch_link(form, k, m):
    ce = np.concatenate([[0.0], np.geomspace(1e-12, 300.0, 80)])
    value, slope, _ = Root(k, m, form).derivatives(ce)
    link = LINKS[form](k, m)
    np.testing.assert_allclose(value, link.value(torch.tensor(ce)), rtol=1e-12)
    # Below 1e-16 of the scale the bounded slope is a rounding error of its value, by design.
    np.testing.assert_allclose(slope, link.slope(torch.tensor(ce)), rtol=1e-6, atol=1e-15)


def test_the_convex_tangent_starts_where_the_torch_links_tangent_starts():
    assert CONVEX_LINEAR_FROM == TORCH_LINEAR_FROM


@pytest.mark.parametrize("form", ["convex", "bounded"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_in_the_thousands_give_finite_values_and_gradients(form, classes, dtype):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 3)).astype(dtype)
    objective = Objective(
        X,
        rng.integers(0, classes, 20),
        classes=classes,
        weight=None,
        root=Root(3.0, None, form),
        l2=0.0,
        fit_intercept=True,
    )
    point = objective.at(rng.normal(size=objective.shape).ravel() * 3000)
    assert np.isfinite(point.value)
    assert np.isfinite(point.gradient).all()
    assert np.isfinite(point.hessian_product(np.ones_like(point.w))).all()
