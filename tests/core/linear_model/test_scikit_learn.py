"""scikit-learn's own battery, with no check left out."""

import numpy as np
import pytest
from rlo_core.linear_model import RootedLogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks


# Its checks fit unscaled tables in 100 iterations, and warn of that for its own estimators too.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Estimator .* was fitted with feature names:UserWarning")
@parametrize_with_checks(
    [
        RootedLogisticRegression(),
        RootedLogisticRegression(form="bounded"),
        RootedLogisticRegression(k=1.0, form="bounded"),
        RootedLogisticRegression(k=np.inf, solver="newton-cg"),
        RootedLogisticRegression(solver="gd"),
        RootedLogisticRegression(form="bounded", solver="agd"),
    ]
)
def test_the_estimator_passes_scikit_learns_checks(estimator, check):
    check(estimator)
