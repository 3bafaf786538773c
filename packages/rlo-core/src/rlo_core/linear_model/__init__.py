"""Logistic regression with rooted losses, as a scikit-learn estimator; it imports no torch."""

from __future__ import annotations

try:
    from rlo_core.linear_model.cross_validation import RootedLogisticRegressionCV
    from rlo_core.linear_model.estimator import RootedLogisticRegression
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("sklearn", "scipy"):
        raise
    raise ModuleNotFoundError(
        f"rlo_core.linear_model needs {error.name}; "
        "install it with `pip install 'rlo-core[sklearn]'`",
        name=error.name,
    ) from error

__all__ = ["RootedLogisticRegression", "RootedLogisticRegressionCV"]
