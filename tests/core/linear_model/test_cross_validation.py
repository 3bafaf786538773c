"""C and k by held-out samples: against a grid search written out, and scikit-learn's battery."""

import numpy as np
import pytest
from rlo_core.linear_model import RootedLogisticRegression, RootedLogisticRegressionCV
from sklearn.datasets import load_iris, make_classification
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks

KS, CS = (1.43, 3.0, np.inf), (0.1, 10.0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Estimator .* was fitted with feature names:UserWarning")
@pytest.mark.filterwarnings("ignore:The least populated class in y has only:UserWarning")
@parametrize_with_checks([RootedLogisticRegressionCV(ks=(3.0,), Cs=(1.0, 10.0), cv=2)])
def test_the_estimator_passes_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("criterion", ["symmetric", "accuracy", "likelihood"])
def test_scores_and_choice_are_those_of_a_grid_written_out(criterion):
    X, y = load_iris(return_X_y=True)
    y = np.array(["a", "b", "c"])[y]
    model = RootedLogisticRegressionCV(ks=KS, Cs=CS, cv=3, criterion=criterion).fit(X, y)
    scores = np.empty((3, 2, 3))
    for f, (train, held) in enumerate(StratifiedKFold(3).split(X, y)):
        for i, k in enumerate(KS):
            for j, C in enumerate(CS):
                fit = RootedLogisticRegression(k=k, form="bounded", C=C).fit(X[train], y[train])
                p = fit.predict_proba(X[held])
                own = p[np.arange(len(held)), np.searchsorted(fit.classes_, y[held])]
                scores[i, j, f] = {
                    "symmetric": 1 - own.mean(),
                    "accuracy": 1 - fit.score(X[held], y[held]),
                    "likelihood": log_loss(y[held], p, labels=fit.classes_),
                }[criterion]
    np.testing.assert_allclose(model.scores_, scores, rtol=1e-9)
    best = np.unravel_index(scores.mean(2).argmin(), (3, 2))
    assert (model.k_, model.C_) == (KS[best[0]], CS[best[1]])
    whole = RootedLogisticRegression(k=model.k_, form="bounded", C=model.C_).fit(X, y)
    np.testing.assert_array_equal(model.coef_, whole.coef_)
    np.testing.assert_array_equal(model.predict(X), whole.predict(X))


def test_samples_of_weight_zero_change_no_score():
    X, y = make_classification(120, 5, random_state=0)
    weight = np.ones(120)
    weight[::4] = 0.0
    cv = [(np.arange(0, 60), np.arange(60, 120)), (np.arange(60, 120), np.arange(0, 60))]
    kept = np.flatnonzero(weight)
    place = {row: i for i, row in enumerate(kept)}
    short = [tuple(np.array([place[r] for r in part if r in place]) for part in s) for s in cv]
    common = {"ks": KS, "Cs": CS, "tol": 1e-8, "max_iter": 1000}
    whole = RootedLogisticRegressionCV(cv=cv, **common).fit(X, y, sample_weight=weight)
    part = RootedLogisticRegressionCV(cv=short, **common).fit(X[kept], y[kept])
    # The penalty is relative to the sum of weights, so the two are one problem.
    np.testing.assert_allclose(whole.scores_, part.scores_, rtol=1e-5)
    assert (whole.k_, whole.C_) == (part.k_, part.C_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "f1"}, "criterion must be one of symmetric, accuracy, likelihood, got 'f1'"),
        ({"ks": ()}, "ks must have at least one value, got none"),
        ({"Cs": ()}, "Cs must have at least one value, got none"),
        ({"cv": 60}, "cv=60 needs 60 samples of each class, got 50 of 0"),
        ({"ks": (0.0,)}, "k must be positive, got 0.0"),
    ],
)
def test_an_option_that_cannot_be_is_named(options, message):
    X, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        RootedLogisticRegressionCV(**options).fit(X, y)
    assert str(caught.value) == message
