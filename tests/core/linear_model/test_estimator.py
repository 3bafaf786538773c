"""What users rely on: LogisticRegression at k = inf, penalties, solvers, weights, refusals."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import sklearn
from rlo_core.linear_model import RootedLogisticRegression
from rlo_core.linear_model.objective import Objective
from rlo_core.linear_model.root import Root
from rlo_core.linear_model.solvers import pairs_kept
from scipy.sparse import csr_array
from sklearn.datasets import load_breast_cancer, load_iris, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version

V1_8 = parse_version("1.8")  # from which on l1_ratio alone says which penalty
TABLES = ["breast_cancer", "wine", "digits", "ionosphere", "spect", "madelon"]
EXACT = {"tol": 1e-8, "max_iter": 3000}


@pytest.fixture
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.mark.parametrize("table", TABLES, indirect=True)
@pytest.mark.parametrize("form", ["convex", "bounded"])
def test_k_of_infinity_is_logistic_regression(table, form):
    X, y = table
    ours = RootedLogisticRegression(k=math.inf, form=form, C=0.1, **EXACT).fit(X, y)
    theirs = LogisticRegression(C=0.1, **EXACT).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-4)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=2e-4)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("table", ["breast_cancer", "wine"], indirect=True)
@pytest.mark.parametrize("form", ["convex", "bounded"])
def test_a_growing_k_tends_to_logistic_regression(table, form):
    X, y = table
    limit = LogisticRegression(C=0.1, **EXACT).fit(X, y).coef_
    gaps = [
        np.abs(RootedLogisticRegression(k=k, form=form, C=0.1, **EXACT).fit(X, y).coef_ - limit)
        for k in (10.0, 100.0, 1000.0)
    ]
    sizes = [gap.max() for gap in gaps]
    assert sizes[0] > 5 * sizes[1] > 25 * sizes[2]


@pytest.mark.parametrize("table", ["breast_cancer", "wine", "ionosphere"], indirect=True)
@pytest.mark.parametrize("k", [2.0, 8.0])
def test_all_four_solvers_find_the_one_minimum_of_the_convex_form(table, k):
    X, y = table
    fits = {
        solver: RootedLogisticRegression(k=k, C=0.1, solver=solver, tol=1e-6, max_iter=5000)
        .fit(X, y)
        .coef_
        for solver in ("lbfgs", "newton-cg", "gd", "agd")
    }
    for coef in fits.values():
        np.testing.assert_allclose(coef, fits["newton-cg"], atol=2e-3)


@pytest.mark.parametrize("solver", ["lbfgs", "gd", "agd"])
def test_the_l1_penalty_is_scikit_learns_at_k_of_infinity(cancer, solver):
    X, y = cancer
    ours = RootedLogisticRegression(
        k=math.inf, C=0.1, l1_ratio=1.0, solver=solver, tol=1e-7, max_iter=20000
    ).fit(X, y)
    named = {"penalty": "elasticnet"} if parse_version(sklearn.__version__) < V1_8 else {}
    theirs = LogisticRegression(
        C=0.1, l1_ratio=1.0, solver="saga", tol=1e-7, max_iter=20000, **named
    ).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-3)
    np.testing.assert_array_equal(ours.coef_ == 0.0, np.abs(theirs.coef_) < 1e-9)
    assert 0 < (ours.coef_ == 0.0).sum() < ours.coef_.size


@pytest.mark.parametrize("solver", ["lbfgs", "gd", "agd"])
def test_the_elastic_net_is_a_stationary_point_of_its_objective(cancer, solver):
    """Subgradient conditions, from the gradient of the smooth part alone."""
    X, y = cancer
    k, C, rho = 2.0, 0.2, 0.4
    fit = RootedLogisticRegression(
        k=k, C=C, l1_ratio=rho, solver=solver, tol=1e-7, max_iter=20000
    ).fit(X, y)
    sign = np.where(y == fit.classes_[1], 1.0, -1.0)
    margin = sign * fit.decision_function(X)
    miss = 1.0 / (1.0 + np.exp(margin))
    slope = (1.0 + np.exp(-margin)) ** (1.0 / k)
    gradient = -(slope * sign * miss) @ X * C + (1.0 - rho) * fit.coef_[0]
    zero = fit.coef_[0] == 0.0
    assert zero.any()
    assert (np.abs(gradient[zero]) <= rho + 1e-3).all()
    np.testing.assert_allclose(gradient[~zero], -rho * np.sign(fit.coef_[0][~zero]), atol=1e-3)


def test_m_counts_as_a_factor_of_c(cancer):
    X, y = cancer
    with_m = RootedLogisticRegression(k=3.0, m=6.0, C=0.1, **EXACT).fit(X, y)
    with_c = RootedLogisticRegression(k=3.0, C=0.2, **EXACT).fit(X, y)
    np.testing.assert_allclose(with_m.coef_, with_c.coef_, atol=1e-4)


@pytest.mark.parametrize("y_of", [lambda y: y, lambda y: np.array(["a", "b", "c"])[y]])
def test_sparse_and_dense_input_give_the_same_model(y_of):
    X, y = load_iris(return_X_y=True)
    dense = RootedLogisticRegression(**EXACT).fit(X, y_of(y))
    sparse = RootedLogisticRegression(**EXACT).fit(csr_array(X), y_of(y))
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-4)
    np.testing.assert_array_equal(sparse.predict(csr_array(X)), dense.predict(X))


def test_sample_weights_count_as_repetitions():
    X, y = load_iris(return_X_y=True)
    times = np.random.default_rng(0).integers(0, 4, len(y))
    weighted = RootedLogisticRegression(**EXACT).fit(X, y, sample_weight=times)
    repeated = RootedLogisticRegression(**EXACT).fit(np.repeat(X, times, 0), np.repeat(y, times))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-5)


def test_class_weights_multiply_sample_weights():
    X, y = load_iris(return_X_y=True)
    by_class = RootedLogisticRegression(class_weight={0: 1.0, 1: 5.0, 2: 2.0}, **EXACT).fit(X, y)
    by_sample = RootedLogisticRegression(**EXACT).fit(
        X, y, sample_weight=np.array([1.0, 5.0, 2.0])[y]
    )
    np.testing.assert_allclose(by_class.coef_, by_sample.coef_, atol=1e-6)


def test_the_bounded_form_resists_flipped_labels_and_the_convex_one_does_not():
    """Two separable clouds, 30 % of one mislabelled, and 20 far points with the wrong label."""
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(-2, 0.7, (300, 2)), rng.normal(2, 0.7, (300, 2))])
    y = np.repeat([0, 1], 300)
    noisy = y.copy()
    noisy[rng.choice(300, 90, replace=False)] = 1
    X = np.concatenate([X, np.full((20, 2), 30.0)])  # far out, on the right side of 1, labelled 0
    noisy, y = np.append(noisy, np.zeros(20, int)), np.append(y, np.ones(20, int))
    score = {
        form: RootedLogisticRegression(k=2.0, form=form, max_iter=1000).fit(X, noisy).score(X, y)
        for form in ("bounded", "convex")
    }
    assert score["bounded"] > 0.99
    assert score["convex"] < 0.9


def test_a_warm_start_at_the_optimum_takes_no_iteration(cancer):
    X, y = cancer
    model = RootedLogisticRegression(warm_start=True, tol=1e-5, max_iter=1000).fit(X, y)
    assert model.n_iter_[0] > 5
    model.set_params(tol=1e-4).fit(X, y)
    assert model.n_iter_[0] == 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg", "gd", "agd"])
def test_no_iterations_leave_the_coefficients_at_zero(cancer, solver):
    model = RootedLogisticRegression(solver=solver, max_iter=0).fit(*cancer)
    assert model.n_iter_[0] == 0
    assert not model.coef_.any()


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg", "gd", "agd"])
def test_the_loss_curve_has_one_value_per_iteration_and_falls(cancer, solver):
    X, y = cancer
    model = RootedLogisticRegression(solver=solver, max_iter=1000).fit(X, y)
    assert len(model.loss_curve_) == model.n_iter_[0]
    assert (np.diff(model.loss_curve_) <= 1e-12).all()


def test_float32_input_gives_float32_coefficients(cancer):
    X, y = cancer
    single = RootedLogisticRegression().fit(X.astype(np.float32), y)
    double = RootedLogisticRegression().fit(X, y)
    assert single.coef_.dtype == np.float32
    np.testing.assert_allclose(single.predict_proba(X), double.predict_proba(X), atol=2e-2)


def test_probabilities_of_two_classes_are_symmetric_under_exchange(cancer):
    X, y = cancer
    one = RootedLogisticRegression(**EXACT).fit(X, y)
    other = RootedLogisticRegression(**EXACT).fit(X, 1 - y)
    np.testing.assert_allclose(one.predict_proba(X), other.predict_proba(X)[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(("size", "pairs"), [(500, 30), (1_000_000, 16), (50_000_000, 10)])
def test_lbfgs_remembers_fewer_steps_of_a_model_too_wide_to_keep_thirty(size, pairs):
    assert pairs_kept(size) == pairs


def test_too_few_iterations_warn(cancer):
    X, y = cancer
    with pytest.warns(ConvergenceWarning, match="solver 'gd' stopped after 3 iterations before"):
        RootedLogisticRegression(solver="gd", max_iter=3).fit(X, y)


def test_the_import_loads_no_torch():
    code = (
        "import sys, rlo_core; rlo_core.linear_model.RootedLogisticRegression; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k must be positive, got 0.0"),
        ({"k": "3"}, "k must be a number, got '3'"),
        ({"k": True}, "k must be a number, got True"),
        ({"m": -1.0}, "m must be positive and finite, got -1.0"),
        ({"k": math.inf, "m": 3.0}, "m must be left out when k is inf, got 3.0"),
        ({"form": "concave"}, "form must be 'convex' or 'bounded', got 'concave'"),
        ({"C": 0.0}, "C must be positive, got 0.0"),
        ({"l1_ratio": 2.0}, "l1_ratio must be in [0, 1], got 2.0"),
        ({"solver": "sgd"}, "solver must be one of lbfgs, newton-cg, gd, agd, got 'sgd'"),
        (
            {"solver": "newton-cg", "l1_ratio": 0.5},
            "l1_ratio must be 0 for solver 'newton-cg', got 0.5; "
            "lbfgs, gd and agd take an L1 penalty",
        ),
        ({"max_iter": -1}, "max_iter must be an integer of at least 0, got -1"),
        ({"max_iter": 1.5}, "max_iter must be an integer of at least 0, got 1.5"),
        ({"tol": -1.0}, "tol must be at least 0, got -1.0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    X, y = make_classification(20, random_state=0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RootedLogisticRegression(**options).fit(X, y)


def test_one_class_is_refused():
    message = "y must have at least two classes, got one class: a"
    with pytest.raises(ValueError, match=f"^{message}$"):
        RootedLogisticRegression().fit([[0.0], [1.0]], ["a", "a"])


def test_a_warm_start_from_another_shape_is_refused():
    X, y = load_iris(return_X_y=True)
    model = RootedLogisticRegression(warm_start=True, max_iter=500).fit(X, y)
    with pytest.raises(ValueError, match=r"coef_ must have shape \(1, 4\) for a warm start, got"):
        model.fit(X, y == 0)


@pytest.mark.parametrize("k", [np.inf, 3.0])
@pytest.mark.parametrize("form", ["convex", "bounded"])
def test_newton_cg_reaches_a_tolerance_below_the_digits_of_the_value(k, form):
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    model = RootedLogisticRegression(k=k, form=form, solver="newton-cg", tol=1e-10).fit(X, y)
    objective = Objective(
        X, y, classes=2, weight=None, root=Root(k, None, form), l2=1 / len(y), fit_intercept=True
    )
    w = np.append(model.coef_[0], model.intercept_)
    assert np.abs(objective.at(w).gradient).max() <= 1e-10
    assert model.n_iter_[0] < 40


def test_newton_cg_says_where_the_digits_end():
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X).astype(np.float32)
    with pytest.warns(ConvergenceWarning, match=r"the gradient falls no further than .* of X"):
        RootedLogisticRegression(solver="newton-cg", tol=1e-14).fit(X, y)
