"""Tables: scikit-learn's linear model, LightGBM and XGBoost under each loss."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rlo_core.compare.measures import Held
from rlo_core.compare.table_data import Table
from rlo_core.compare.task import DivergedError, Task
from rlo_core.errors import DataError, SpecError
from rlo_core.files import write_json
from rlo_core.registry import create_loss, link_of, parse_spec

MODELS = ("logistic", "lightgbm", "xgboost")
HELD = 0.2
"""The share of the rows that each seed holds out."""
_LINEAR = ("ce", "rlo", "rlo-convex")
_RATES = {"logistic": (0.01, 0.1, 1.0, 10.0, 100.0), "trees": (0.01, 0.03, 0.1, 0.3)}


class TableTask(Task):
    """A table under one model; each seed draws a split of its own, a fifth held out by class.

    Args:
        table: Features and the given labels.
        model: One of `MODELS`.
        rates: C of the linear model, or the learning rate of the trees; None for a grid.
        trees: How many trees.
        trusted: Rows with labels that are known to be right, or None.

    Raises:
        DataError: one class, or a class with fewer rows than a split needs.
    """

    host: ClassVar[str] = "table"

    def __init__(
        self,
        table: Table,
        *,
        model: str = "logistic",
        rates: tuple[float, ...] | None = None,
        trees: int = 100,
        trusted: Table | None = None,
    ) -> None:
        check_classes(table)
        self.table, self.model, self.trees, self.trusted = table, model, trees, trusted
        self.rate_name = "C" if model == "logistic" else "learning_rate"
        self.rates = tuple(sorted(rates or _RATES["logistic" if model == "logistic" else "trees"]))
        self.default = len(self.rates) // 2
        self.overlap = HELD / (1 - HELD)

    def describe(self) -> dict[str, Any]:
        described = {
            "data": [self.table.name, self.table.fingerprint()],
            "rows": len(self.table.y),
            "columns": self.table.X.shape[1],
            "classes": len(self.table.classes),
            "model": self.model,
            "trees": None if self.model == "logistic" else self.trees,
        }
        if self.trusted is not None:
            described["trusted"] = [self.trusted.name, self.trusted.fingerprint()]
        return described

    def check(self, loss: str) -> None:
        criterion = create_loss(loss)
        if self.model == "logistic":
            if parse_spec(loss).name not in _LINEAR or parse_spec(loss).gates:
                raise SpecError(
                    f"loss '{loss}' cannot be fitted by model 'logistic', which takes "
                    f"{', '.join(_LINEAR)}; --model lightgbm takes every loss that has a link"
                )
        elif link_of(criterion) is None or parse_spec(loss).gates:
            raise SpecError(f"loss '{loss}' has no link, so trees cannot be boosted with it")
        else:
            self.estimator(loss, self.rates[0], 0)  # the library may not be installed

    def estimator(self, loss: str, rate: float, seed: int) -> Any:
        """Return the unfitted estimator of a loss."""
        if self.model == "logistic":
            from rlo_core.linear_model import RootedLogisticRegression

            spec = parse_spec(loss)
            options = {name: float(v) for name, v in spec.options.items() if v.lower() != "none"}
            if spec.name == "ce":
                options = {"k": math.inf}
            form = "convex" if spec.name == "rlo-convex" else "bounded"
            return RootedLogisticRegression(form=form, C=rate, max_iter=500, **options)  # type: ignore[arg-type]
        common = {"n_estimators": self.trees, "learning_rate": rate, "random_state": seed}
        try:
            if self.model == "lightgbm":
                from rlo_core.boosting_estimators import RootedLGBMClassifier

                return RootedLGBMClassifier(loss, n_jobs=1, verbose=-1, **common)
            from rlo_core.boosting_estimators import RootedXGBClassifier

            return RootedXGBClassifier(loss, n_jobs=1, **common)
        except ModuleNotFoundError as error:
            raise DataError(str(error)) from error

    def _pipeline(self, loss: str, rate: float, seed: int) -> Any:
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        estimator = self.estimator(loss, rate, seed)
        if self.model != "logistic":
            return make_pipeline(estimator)
        steps = [SimpleImputer(keep_empty_features=True), StandardScaler(), estimator]
        return make_pipeline(*steps)

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        from sklearn.model_selection import train_test_split

        X, y = self.table.X, self.table.y
        train, held, a, b = train_test_split(X, y, test_size=HELD, random_state=seed, stratify=y)
        model = self._fit(loss, rate, seed, train, a)
        record = measure(model, held, b)
        if self.trusted is not None:
            record["trusted"] = measure(model, self.trusted.X, self.trusted.y)
        return record

    def _fit(self, loss: str, rate: float, seed: int, X: NDArray[Any], y: NDArray[Any]) -> Any:
        model = self._pipeline(loss, rate, seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*stopped after.*")
            warnings.filterwarnings("ignore", message=".*valid feature names.*")
            try:
                with np.errstate(over="ignore", invalid="ignore"):
                    return model.fit(X, y)
            except FloatingPointError as error:
                raise DivergedError(str(error)) from error

    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        """Fit on all rows; a linear model is saved as JSON, trees in their library's format."""
        model = self._fit(loss, rate, 0, self.table.X, self.table.y)
        last = model[-1]
        described = {
            "loss": loss, self.rate_name: rate, "model": self.model,
            "classes": self.table.classes, "columns": self.table.columns,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        if self.model == "logistic":
            described |= {
                "fill": model[0].statistics_.tolist(),
                "mean": model[1].mean_.tolist(),
                "scale": model[1].scale_.tolist(),
                "coef": last.coef_.tolist(),
                "intercept": last.intercept_.tolist(),
            }
        elif self.model == "lightgbm":
            last.booster_.save_model(str(out / "model.txt"))
            described |= {"trees": "model.txt", "start": np.asarray(last.start_).tolist()}
        else:
            last.get_booster().save_model(str(out / "model.json"))
            described |= {"trees": "model.json"}
        write_json(out / "winner.json", described)
        score = float((model.predict(self.table.X) == self.table.y).mean())
        return {
            "saved": str(out / "winner.json"),
            "rows": len(self.table.y),
            "train_accuracy": score,
        }


def check_classes(table: Table) -> None:
    """Raise DataError for one class, or a class that cannot be split."""
    counts = np.bincount(table.y, minlength=len(table.classes))
    present = [c for c, n in zip(table.classes, counts, strict=True) if n]
    if len(present) < 2:
        raise DataError(
            f"{table.name} has one class, {present[0]!r}; a comparison needs two or more"
        )
    rare = [(c, int(n)) for c, n in zip(table.classes, counts, strict=True) if 0 < n < 2]
    if rare:
        raise DataError(
            f"class {rare[0][0]!r} of {table.name} has {rare[0][1]} row; a held-out split needs "
            "two of each class, so leave it out or get more"
        )
    classes, rows = len(present), len(table.y)
    if min(int(rows * HELD), rows - int(rows * HELD)) < classes:
        raise DataError(
            f"{table.name} has {rows} rows for {classes} classes; a held-out fifth needs one of "
            f"each class, {math.ceil(classes / HELD)} rows or more"
        )


def measure(model: Any, X: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
    """Return the figures of a fitted estimator on rows with labels."""
    import torch

    p = np.asarray(model.predict_proba(X), dtype=np.float64)
    if not np.isfinite(p).all():
        raise DivergedError("probabilities are not finite")
    held = Held()
    held.update(torch.from_numpy(np.log(np.maximum(p, 1e-300))), torch.from_numpy(y))
    return held.result()
