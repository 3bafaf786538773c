"""Fit time of RootedLogisticRegression against LogisticRegression(lbfgs) at equal gradient norm.

Both stop at the same largest entry of the gradient of the mean objective (`tol`), which is
scikit-learn's own criterion, so a ratio compares like with like. Digits has ten classes and small
matrices, where a fit is bound by NumPy's overhead; Madelon has 500 features; the synthetic table of
100,000 x 100 is bound by memory. `iterations` says how much of a ratio is the objective's and how
much the code's: at k = inf both minimise the same function.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import compare, write_results
from rlo_core.linear_model import RootedLogisticRegression
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

UCI = Path(__file__).resolve().parents[2] / "shared" / "data" / "uci"
TOL = 1e-4


def tables() -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Return table, target and C by name; scaled, as a linear model's input should be."""
    found = {}
    X, y = load_digits(return_X_y=True)
    found["digits 1797x64, 10 classes"] = (StandardScaler().fit_transform(X), y, 1.0)
    if UCI.is_dir():
        rows = np.genfromtxt(UCI / "madelon_train.csv.gz", delimiter=",", skip_header=1)
        X = StandardScaler().fit_transform(rows[:, :-1])
        found["madelon 2000x500"] = (X, rows[:, -1], 1.0)
    else:
        print("no Madelon at ../shared/data/uci: left out", file=sys.stderr)
    X, y = make_classification(100_000, 100, n_informative=40, flip_y=0.05, random_state=0)
    found["synthetic 100000x100"] = (X, y, 1.0)
    return found


def models(C: float) -> dict[str, Any]:
    common = {"C": C, "tol": TOL, "max_iter": 2000}
    rooted = RootedLogisticRegression
    return {
        "LogisticRegression": LogisticRegression(**common),
        "rooted k=inf": rooted(k=math.inf, **common),
        "rooted convex k=3": rooted(k=3.0, **common),
        "rooted convex k=8": rooted(k=8.0, **common),
        "rooted bounded k=3": rooted(k=3.0, form="bounded", **common),
        "rooted convex k=3, newton-cg": rooted(k=3.0, solver="newton-cg", **common),
    }


def main() -> None:
    records = []
    for name, (X, y, C) in tables().items():
        fits = models(C)
        rounds = 5 if len(X) > 10_000 else 9
        times = compare(
            {label: (lambda m=m, X=X, y=y: m.fit(X, y)) for label, m in fits.items()},
            rounds=rounds,
            warmup=1,
        )
        base = times["LogisticRegression"]["median"]
        for label, model in fits.items():
            record = {
                "table": name,
                "model": label,
                "seconds": times[label],
                "ratio": times[label]["median"] / base,
                "iterations": int(model.n_iter_[0]),
                "accuracy": model.score(X, y),
                "rounds": rounds,
                "tol": TOL,
                "C": C,
            }
            records.append(record)
            print(f"{name:28} {label:32} {times[label]['median']:8.4f} s  x{record['ratio']:.2f}")
    write_results("regression", records)


if __name__ == "__main__":
    main()
