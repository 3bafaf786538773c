"""Tables for logistic regression: those of scikit-learn, and the UCI ones where they are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.preprocessing import StandardScaler

OURS = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
UCI = {
    "ionosphere": "ionosphere.csv",
    "spect": "spect_train.csv",
    "madelon": "madelon_train.csv.gz",
}


@pytest.fixture
def table(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """A scaled table by name, e.g. `@pytest.mark.parametrize("table", ["wine"], indirect=True)`."""
    if request.param in OURS:
        X, y = OURS[request.param](return_X_y=True)
    else:
        folder: Path = request.getfixturevalue("shared_data")
        rows = np.genfromtxt(folder / "uci" / UCI[request.param], delimiter=",", skip_header=1)
        X, y = rows[:, :-1], rows[:, -1].astype(int)
    return StandardScaler().fit_transform(X), y
