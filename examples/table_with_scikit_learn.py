"""A table: rooted logistic regression where `LogisticRegression` stood.

    python examples/table_with_scikit_learn.py

Five-fold accuracy of both forms of the loss beside scikit-learn's own logistic regression.
"""

from __future__ import annotations

from rlo_core.linear_model import RootedLogisticRegression
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main() -> None:
    """Print one line for each estimator."""
    X, y = load_breast_cancer(return_X_y=True)
    estimators = {
        "logistic regression": LogisticRegression(),
        "rooted, convex, k=3": RootedLogisticRegression(k=3.0, form="convex"),
        "rooted, bounded, k=3": RootedLogisticRegression(k=3.0, form="bounded"),
    }
    for name, estimator in estimators.items():
        scores = cross_val_score(make_pipeline(StandardScaler(), estimator), X, y, cv=5)
        print(f"{name:22} accuracy {scores.mean():.3f} +- {scores.std():.3f}")


if __name__ == "__main__":
    main()
