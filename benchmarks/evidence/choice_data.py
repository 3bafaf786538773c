"""The data of `choice.py`: for each cell a function from a seed to training, held-out, test."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from runner import ROOT, data_folder
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


@dataclass(frozen=True)
class Split:
    """Samples and labels; those of `train` and `held` as given, those of `test` clean."""

    train: tuple[Any, Any]
    held: tuple[Any, Any]
    test: tuple[Any, Any]
    wrong: float
    held_is_fixed: bool = False


Cells = Iterator[tuple[str, Callable[[int], Split]]]


def heads(name: str, options: dict[str, Any]) -> Cells:
    """CIFAR-10 features with human labels, or with labels made wrong by a seed of their own."""
    import pyarrow.parquet as parquet

    count = options["train_images"] + options["held_images"]
    cache = ROOT / "build" / f"choice-features-{count}-{options['test_images']}.pt"
    if not cache.exists():
        from vision import features_of, load_images

        folder = data_folder("cifar10", None)
        x, clean = load_images(folder, "train", count)
        test, test_y = load_images(folder, "test", options["test_images"])
        checkpoint = data_folder("resnet-cifar10", None) / options["features"]
        x, test = features_of(x, checkpoint), features_of(test, checkpoint)
        cache.parent.mkdir(exist_ok=True)
        torch.save((x, clean, test, test_y), cache)
    x, clean, test, test_y = torch.load(cache, weights_only=True)
    scale, shift = x.std(0), x.mean(0)
    x, test = (x - shift) / scale, (test - shift) / scale
    table = parquet.read_table(data_folder("cifar10n", None) / "cifar10n.parquet")
    for cell in options["cells"]:
        kind, _, share = cell.partition("-")
        if kind == "clean":
            given = clean
        elif kind in ("symmetric", "pairflip"):
            generator = torch.Generator().manual_seed(7)
            wrong = torch.rand(count, generator=generator) < float(share)
            shift_by = torch.randint(1, 10, (count,), generator=generator)
            given = torch.where(
                wrong, (clean + (shift_by if kind == "symmetric" else 1)) % 10, clean
            )
        else:
            column = {"random1": "random_label1"}.get(kind, f"{kind}_label")
            given = torch.tensor(table[column].to_numpy()[:count].astype(np.int64))
        cut = options["train_images"]

        # The split is one; the seed is that of the training.
        def split(seed: int, given: torch.Tensor = given, cut: int = cut) -> Split:
            return Split(
                (x[:cut], given[:cut]), (x[cut:], given[cut:]), (test, test_y),
                float((given != clean).float().mean()), held_is_fixed=True,
            )  # fmt: skip

        yield cell, split


def _titles(file: str) -> tuple[list[str], list[str]]:
    path = data_folder("noisy-news", None) / file
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["news_title"] for row in rows], [row["label"].lower() for row in rows]


def news(name: str, options: dict[str, Any]) -> Cells:
    """News titles; a fifth of the training titles is held out, another fifth for each seed."""
    for cell in options["cells"]:
        language, _, kind = cell.partition("-")
        texts, truth = _titles(f"{language}_train_clean.tsv")
        given = truth
        if kind == "rules":
            _, given = _titles(f"{language}_train_clean_noisy_labels.tsv")
        test, test_y = _titles(f"{language}_test.tsv")
        names = sorted({*truth, *given, *test_y})
        codes = {label: i for i, label in enumerate(names)}
        y = np.array([codes[label] for label in given])
        wrong = float(np.mean([a != b for a, b in zip(given, truth, strict=True)]))
        vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
        X, T = vectors.fit_transform(texts), vectors.transform(test)
        clean = np.array([codes[label] for label in test_y])
        present = np.isin(clean, np.unique(y))

        def split(
            seed: int,
            X: Any = X,
            y: Any = y,
            T: Any = T[present],
            clean: Any = clean[present],
            wrong: float = wrong,
        ) -> Split:
            kept = np.unique(y, return_inverse=True)[1]
            order = {int(c): i for i, c in enumerate(np.unique(y))}
            train, held, a, b = train_test_split(
                X, kept, test_size=0.2, random_state=seed, stratify=kept
            )
            return Split(
                (train, a), (held, b), (T, np.array([order[int(c)] for c in clean])), wrong
            )

        yield cell, split


def _table(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name in ("breast_cancer", "digits"):
        X, y = (load_breast_cancer if name == "breast_cancer" else load_digits)(return_X_y=True)
        return X, y
    folder = data_folder("uci", None)
    files = ["spect_train.csv", "spect_test.csv"] if name == "spect" else [f"{name}.csv"]
    rows = np.concatenate([np.genfromtxt(folder / f, delimiter=",", skip_header=1) for f in files])
    return rows[:, :-1], rows[:, -1].astype(int)


def tables(name: str, options: dict[str, Any]) -> Cells:
    """Small tables: 30 % test with clean labels, a fifth of the rest held out, by each seed.

    `flips`: the share of every second class that is called the class before it (asymmetric), and a
    quarter of that the other way. `wrong`: the share replaced by any other class.
    """
    uneven = "flips" in options
    for table in options["cells"]:
        X, y = _table(table)
        classes = int(y.max()) + 1
        for share in options["flips" if uneven else "wrong"]:

            def split(
                seed: int, X: Any = X, y: Any = y, share: float = share, classes: int = classes
            ) -> Split:
                rest, test, a, clean = train_test_split(
                    X, y, test_size=0.3, random_state=seed, stratify=y
                )
                random = np.random.default_rng(seed)
                if uneven:
                    odd = a % 2 == 1
                    rate = np.where(odd, share, share / 4)
                    other = np.where(odd, a - 1, np.minimum(a + 1, classes - 1))
                else:
                    rate = np.full(len(a), share)
                    other = (a + random.integers(1, classes, len(a))) % classes
                given = np.where(random.random(len(a)) < rate, other, a)
                train, held, b, c = train_test_split(
                    rest, given, test_size=0.25, random_state=seed, stratify=given
                )
                scaler = StandardScaler().fit(train)
                parts = [scaler.transform(part) for part in (train, held, test)]
                wrong = float((given != a).mean())
                return Split((parts[0], b), (parts[1], c), (parts[2], clean), wrong)

            yield f"{table}-{'uneven' if uneven else 'even'}-{share:g}", split
