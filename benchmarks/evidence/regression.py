"""Regression evidence: logistic regression and both rooted forms on six tables.

    python benchmarks/evidence/regression.py benchmarks/evidence/configs/regression.yaml

Each seed is a stratified split; the columns are scaled on its training part. With L2, C is chosen
by cross-validated accuracy inside the training part (ties go to the stronger penalty), so the test
part is seen once. Without, C is inf and `max_iter` stops a separable table. Iterations are counted
to a relative gap of 1e-4, (f - f*)/(f0 - f*), each model on its own objective, with the path's C.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
from rlo_core.linear_model import RootedLogisticRegression
from rlo_core.linear_model.objective import Objective
from rlo_core.linear_model.root import Root
from rlo_core.runs.record import Run
from runner import RESULTS, Results, data_folder, load_config
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.preprocessing import StandardScaler

LOGGED = 100
SHIPPED = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
UCI = {
    "ionosphere": ["ionosphere.csv"],
    "spect": ["spect_train.csv", "spect_test.csv"],
    "madelon": ["madelon_train.csv.gz", "madelon_valid.csv.gz"],
}


def load_table(name: str, folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows of a table: the parts of a divided one are joined and split anew."""
    if name in SHIPPED:
        return SHIPPED[name](return_X_y=True)
    files = [data_folder("uci", folder) / file for file in UCI[name]]
    rows = np.concatenate([np.genfromtxt(f, delimiter=",", skip_header=1) for f in files])
    return rows[:, :-1], rows[:, -1].astype(int)


def fit_and_score(
    model: RootedLogisticRegression, parts: list[np.ndarray]
) -> tuple[RootedLogisticRegression, dict[str, float]]:
    X, X_test, y, y_test = parts
    model.fit(X, y)
    scores = {
        "accuracy": float(model.score(X_test, y_test)),
        "log_loss": float(log_loss(y_test, model.predict_proba(X_test), labels=model.classes_)),
        "train_accuracy": float(model.score(X, y)),
    }
    return model, scores


def accuracy(
    config: dict[str, Any], parts: list[np.ndarray], k: float, form: Any, seed: int
) -> Any:
    """Return test figures with the L2 penalty that cross-validation picks, and with none."""
    X, _, y, _ = parts
    folds = StratifiedKFold(config["inner_folds"], shuffle=True, random_state=seed)

    def model(C: float) -> RootedLogisticRegression:
        return RootedLogisticRegression(k=k, form=form, C=C, max_iter=config["max_iter"])

    inner = [cross_val_score(model(C), X, y, cv=folds).mean() for C in config["C"]]
    C = config["C"][int(np.argmax(inner))]
    _, tuned = fit_and_score(model(C), parts)
    free, plain = fit_and_score(model(math.inf), parts)
    return {"l2": {"C": C, **tuned}, "none": {"iterations": int(free.n_iter_[0]), **plain}}


def condition(model: RootedLogisticRegression, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Return the condition number of the Hessian at a model, and how many eigenvalues are < 0.

    Directions without curvature (the common shift of multinomial intercepts) are left out.
    """
    objective = Objective(
        X,
        np.searchsorted(model.classes_, y),
        classes=len(model.classes_),
        weight=None,
        root=Root(model.k, model.m, model.form),
        l2=1.0 / (model.C * len(y)),
        fit_intercept=True,
    )
    point = objective.at(np.column_stack([model.coef_, model.intercept_]).ravel())
    if objective.sign is not None:  # X' diag(h) X is one product
        miss = np.abs(point.residual[0])
        h = point.slope * miss * (1 - miss) + point.curvature * miss**2
        design = np.column_stack([X, np.ones(len(X))])
        hessian = design.T @ (design * (h / len(y))[:, None])
        hessian[np.diag_indices(X.shape[1])] += objective.l2
    else:
        hessian = np.stack([point.hessian_product(e) for e in np.eye(point.w.size)])
    values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    size = np.abs(values)
    size = size[size > 1e-10 * size.max()]
    return {
        "condition": float(size.max() / size.min()),
        "negative": int((values < -1e-10 * size.max()).sum()),
    }


def path(
    config: dict[str, Any], parts: list[np.ndarray], k: float, form: Any, run: Run | None
) -> dict[str, Any]:
    """Return iterations to 1e-4 of the optimum per solver, and conditioning along the way.

    `run` is told the relative gap after each of the first `LOGGED` iterations.
    """
    X, _, y, _ = parts
    C = config["path_C"]

    def fit(solver: str, max_iter: int, tol: float) -> RootedLogisticRegression:
        model = RootedLogisticRegression(k=k, form=form, C=C, max_iter=max_iter, tol=tol)
        return model.set_params(solver=solver).fit(X, y)

    optimum = fit("newton-cg", 500, 1e-9)
    curves = {s: fit(s, config["path_max_iter"], 1e-6).loss_curve_ for s in config["path_solvers"]}
    start = _value_at_zero(optimum, X, y)
    # The bounded form may have several minima; the lowest value that was seen is the reference.
    best = min(min(curve) for curve in [*curves.values(), optimum.loss_curve_])
    iterations = {}
    for solver, curve in curves.items():
        gaps = (np.array(curve) - best) / (start - best)
        near = np.flatnonzero(gaps <= 1e-4)
        iterations[solver] = int(near[0]) + 1 if near.size else None
        for step, gap in enumerate(gaps[:LOGGED] if run else [], 1):
            run.log(step=step, split=solver, relative_gap=float(gap))
    conditions = {str(i): condition(fit("lbfgs", i, 1e-6), X, y) for i in config["path_iterations"]}
    conditions["end"] = condition(optimum, X, y)
    return {"iterations": iterations, "conditions": conditions}


def _value_at_zero(model: RootedLogisticRegression, X: np.ndarray, y: np.ndarray) -> float:
    zero = Root(model.k, model.m, model.form)
    return float(zero.derivatives(np.array([math.log(len(model.classes_))]))[0][0])


def measure(
    config: dict[str, Any],
    table: str,
    parts: list[np.ndarray],
    model: tuple[str, float, Any],
    seed: int,
    runs: Path | None,
) -> dict[str, Any]:
    """Return everything that is measured of one model on one split of one table."""
    label, k, form = model
    name = {"convex": "rlo-convex", "bounded": "rlo"}[form]
    run = runs and Run.create(
        runs / f"{table}_{label.replace('/', '_')}_seed={seed}",
        kind="evidence regression",
        loss="ce" if math.isinf(k) else f"{name}:k={k:g}",
        options={"table": table, "C": config["path_C"]},
        seed=seed,
        data={"name": table, "train": len(parts[0]), "test": len(parts[1])},
    )
    found = accuracy(config, parts, k, form, seed)
    if seed < config["path_seeds_below"].get(table, math.inf):
        found |= path(config, parts, k, form, run)
    if run:
        scores = {f"{p}_{key}": v for p in ("l2", "none") for key, v in found[p].items()}
        counts = {f"iterations_{s}": n for s, n in found.get("iterations", {}).items()}
        run.finish(**scores, **counts)
    return {"table": table, "seed": seed, "model": label, **found}


@click.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", help="Folder with the UCI tables.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS / "evidence_regression.jsonl"
)
@click.option("--runs", type=click.Path(path_type=Path), help="Write run folders for `rlo report`.")
def main(config_file: Path, data: str | None, out: Path, runs: Path | None) -> None:
    """Run what CONFIG_FILE lists and is not yet in the results."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the records instead
    config = load_config(config_file)
    results = Results(out, config)
    models = [("lr", math.inf, "convex")]
    models += [(f"{form}/k={k}", float(k), form) for form in config["forms"] for k in config["k"]]
    for table in config["tables"]:
        X, y = load_table(table, data)
        for seed in config["seeds"]:
            parts = train_test_split(
                X, y, test_size=config["test_share"], stratify=y, random_state=seed
            )
            scaler = StandardScaler().fit(parts[0])
            parts[0], parts[1] = scaler.transform(parts[0]), scaler.transform(parts[1])
            for model in models:
                results.measure(
                    f"{table}/seed={seed}/{model[0]}",
                    lambda t=table, s=seed, m=model, p=parts: measure(config, t, p, m, s, runs),
                )


if __name__ == "__main__":
    main()
