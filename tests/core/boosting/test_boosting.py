"""Links as objectives of boosted trees, against autograd and against the libraries' own."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from rlo_core.boosting import (
    boosting_link,
    catboost_objective,
    derivatives,
    lgb_metric,
    lgb_objective,
    losses,
    xgb_metric,
    xgb_objective,
)
from rlo_core.errors import SpecError
from rlo_core.functional import link_cross_entropy
from sklearn.datasets import load_breast_cancer, load_wine

SPECS = ["ce", "rlo:k=3", "rlo:k=1", "rlo-convex:k=2", "gce:q=0.7", "focal", "poly1", "dft"]


def of_autograd(link, scores, target):
    """Loss, gradient and the diagonal of the whole Hessian, float64, of two-column logits too."""

    def loss(row, label):
        logits = torch.stack([torch.zeros_like(row), row]) if row.dim() == 0 else row
        return link_cross_entropy(logits, label, link)

    x = torch.tensor(scores, dtype=torch.float64)
    y = torch.tensor(target)
    found = [
        (loss(r, t), torch.func.grad(loss)(r, t), torch.func.jacrev(torch.func.grad(loss))(r, t))
        for r, t in zip(x, y, strict=True)
    ]
    value, gradient, hessian = (torch.stack(part) for part in zip(*found, strict=True))
    diagonal = hessian if x.dim() == 1 else hessian.diagonal(dim1=1, dim2=2)
    return value.numpy(), gradient.numpy(), diagonal.numpy()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_derivatives_are_autograds_but_for_the_curvature_that_bends_down(spec, classes):
    random = np.random.default_rng(0)
    scores = 3 * random.standard_normal(40 if classes == 2 else (40, classes))
    target = random.integers(0, classes, 40)
    link = boosting_link(spec)
    value, gradient, hessian = of_autograd(link, scores, target)
    ours = derivatives(link, scores, target)
    if spec != "dft":  # its value is no antiderivative of its slope: that is its definition
        np.testing.assert_allclose(losses(link, scores, target), value, rtol=1e-10)
    np.testing.assert_allclose(ours[0], gradient, rtol=1e-9, atol=1e-12)
    assert (ours[1] >= 0).all()
    if spec in ("ce", "rlo-convex:k=2"):  # bends up everywhere: the whole curvature
        np.testing.assert_allclose(ours[1], hessian, rtol=1e-8, atol=1e-12)
    else:
        assert (ours[1] >= hessian - 1e-9).all()


def test_far_scores_stay_finite():
    for spec in SPECS:
        for scores in (
            np.array([-1e3, 1e3, 700.0]),
            np.array([[-1e3, 1e3], [50.0, -800.0], [0, 0]]),
        ):
            for part in derivatives(boosting_link(spec), scores, [1, 0, 1]):
                assert np.isfinite(part).all(), spec


def test_weights_multiply_and_objectives_are_pickled():
    for objective in (lgb_objective("rlo:k=3"), xgb_objective("rlo:k=3")):
        again = pickle.loads(pickle.dumps(objective))  # ours, from a moment ago
        y, x, w = np.array([1, 0, 1]), np.array([0.3, -2.0, -1.0]), np.array([2.0, 0.5, 1.0])
        for plain, weighted in zip(objective(y, x), again(y, x, w), strict=True):
            np.testing.assert_allclose(weighted, plain * w)


def test_a_loss_without_a_link_is_refused(good_plugin):
    with pytest.raises(SpecError, match=r"^loss 'margin' has no link, so trees cannot be boosted"):
        lgb_objective("margin")


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_cross_entropy_is_lightgbms_own_model(load):
    lightgbm = pytest.importorskip("lightgbm")
    from rlo_core.boosting_estimators import RootedLGBMClassifier

    x, y = load(return_X_y=True)
    options = {"n_estimators": 15, "min_child_samples": 5, "verbose": -1, "n_jobs": 1}
    ours = RootedLGBMClassifier("ce", **options).fit(x, y)
    theirs = lightgbm.LGBMClassifier(**options).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=2e-3)
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.99


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_cross_entropy_is_xgboosts_own_model(load):
    xgboost = pytest.importorskip("xgboost")
    from rlo_core.boosting_estimators import RootedXGBClassifier

    x, y = load(return_X_y=True)
    options = {"n_estimators": 15, "n_jobs": 1, "base_score": 0.5}
    ours = RootedXGBClassifier("ce", **options).fit(x, y)
    theirs = xgboost.XGBClassifier(**options).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=2e-3)


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
@pytest.mark.parametrize("spec", ["rlo:k=3", "rlo-convex:k=2", "gce:q=0.7"])
def test_estimators_learn_with_other_losses_and_take_weights_and_names(load, spec):
    x, y = load(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    weight = np.ones(len(y))
    pytest.importorskip("lightgbm")
    pytest.importorskip("xgboost")
    from rlo_core.boosting_estimators import RootedLGBMClassifier, RootedXGBClassifier
    from sklearn.base import clone

    lgbm = RootedLGBMClassifier(spec, n_estimators=30, min_child_samples=5, verbose=-1, n_jobs=1)
    lgbm = clone(lgbm).fit(x, names, sample_weight=weight)
    assert lgbm.get_params()["loss"] == spec
    assert (lgbm.predict(x) == names).mean() > 0.95
    np.testing.assert_allclose(lgbm.predict_proba(x).sum(axis=1), 1.0)
    xgb = clone(RootedXGBClassifier(spec, n_estimators=30, n_jobs=1)).fit(
        x, y, sample_weight=weight
    )
    assert xgb.get_params()["loss"] == spec
    assert (xgb.predict(x) == y).mean() > 0.95


def test_metrics_are_the_mean_loss_of_raw_scores():
    y, x = np.array([1, 0]), np.array([0.5, 2.0])
    expected = losses(boosting_link("rlo:k=3"), x, y)
    assert lgb_metric("rlo:k=3")(y, x) == ("rlo:k=3", pytest.approx(expected.mean()), False)
    weighted = np.average(expected, weights=[3, 1])
    assert xgb_metric("rlo:k=3")(y, x, [3, 1]) == pytest.approx(weighted)


def test_catboost_gets_the_derivatives_of_what_it_makes_large():
    objective = catboost_objective("rlo:k=3")
    gradient, curvature = derivatives(boosting_link("rlo:k=3"), [0.3, -1.0], [1, 0])
    found = np.array(objective.calc_ders_range([0.3, -1.0], [1, 0], None))
    np.testing.assert_allclose(found, np.stack([-gradient, -curvature], axis=1))
    first, second = objective.calc_ders_multi([0.3, -1.0, 0.2], 1.0, 2.0)
    gradient, curvature = derivatives(boosting_link("rlo:k=3"), [[0.3, -1.0, 0.2]], [1])
    np.testing.assert_allclose(first, -2 * gradient[0])
    np.testing.assert_allclose(second, np.diag(-2 * curvature[0]))


@pytest.mark.filterwarnings("ignore:Failed to import numba:UserWarning")
def test_catboost_trains_with_it():
    catboost = pytest.importorskip("catboost")
    x, y = load_breast_cancer(return_X_y=True)
    model = catboost.CatBoostClassifier(
        loss_function=catboost_objective("rlo:k=3"), eval_metric="Logloss", iterations=10,
        verbose=False, allow_writing_files=False, thread_count=1,
    ).fit(x, y)  # fmt: skip
    assert (model.predict(x, prediction_type="Class") == y).mean() > 0.9
