"""The data sets of `rlo-timm train`: what each is, and where it has to be."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlo_core.errors import DataError
from timm.data.dataset_factory import create_dataset
from torch.utils.data import IterableDataset
from torchvision import datasets  # type: ignore[import-untyped]

from rlo_timm.trainer import tiny_imagenet
from rlo_timm.trainer.names import DATASETS, PREFIXES, dataset_name, did_you_mean
from rlo_timm.trainer.pictures import (
    DatasetSource,
    ListSource,
    ParquetSource,
    Pictures,
    Source,
    stratified,
)
from rlo_timm.trainer.settings import TrainSettings

VALIDATION = ("val", "validation", "valid", "test")
SIZES = {"cifar10": 32, "cifar100": 32, "digits": 32, "tiny-imagenet": 64}
SIZES |= {"food101": 224, "imagenet": 224}


@dataclass(frozen=True)
class Data:
    """A training and a validation set before their transforms.

    Args:
        train: Pictures, or timm's stream of them (wds/, hfids/, tfds/).
        val: The same.
        classes: The names of the classes.
        size: Image side in pixels, of the data set.
        flip: Whether a mirrored picture has the same label.
        cifar: Normalised by CIFAR's statistics instead of ImageNet's.
    """

    train: Pictures | IterableDataset[Any]
    val: Pictures | IterableDataset[Any]
    classes: Sequence[str]
    size: int
    flip: bool = True
    cifar: bool = False

    def describe(self, name: str, size: int) -> dict[str, Any]:
        """Return what identifies it in run.json."""
        document: dict[str, Any] = {"name": name, "classes": len(self.classes), "size": size}
        if isinstance(self.train, Pictures) and isinstance(self.val, Pictures):
            document |= {"train": len(self.train), "val": len(self.val)}
            document["fingerprint"] = f"{self.train.fingerprint()}-{self.val.fingerprint()}"
        return document


def load_data(settings: TrainSettings, *, seed: int = 0) -> Data:
    """Open the data set that the settings name.

    Args:
        settings: dataset, data_dir, splits, download, num_classes and the limits count.
        seed: Of the order of a stream.

    Raises:
        DataError: it is not there (and what to put where), or not laid out as expected.
    """
    name, root = dataset_name(settings.dataset), Path(settings.data_dir)
    if name == "digits":
        return _limited(_digits(), settings, flip=False)
    if name in ("cifar10", "cifar100"):
        return _limited(_cifar(name, root, settings.download), settings, cifar=True)
    if name == "food101":
        return _limited(_food101(root, settings.download), settings)
    if name in ("tiny-imagenet", "imagenet"):
        return _limited(_folder(_named_folder(name, root), SIZES[name]), settings)
    if name.startswith(PREFIXES):
        return _from_timm(name, settings, seed)
    path = _path(settings.dataset)
    if path.is_file() or any(path.glob("*.parquet")):
        return _limited(_parquet(path), settings)
    return _limited(_folder(path, None), settings)


def check_data(settings: TrainSettings) -> int:
    """Refuse what `load_data` would, as far as that is known without reading pictures.

    Returns:
        The image side of the data set.

    Raises:
        DataError: as `load_data`.
    """
    name, root = dataset_name(settings.dataset), Path(settings.data_dir)
    if name in ("tiny-imagenet", "imagenet"):
        _named_folder(name, root)
    elif name in DATASETS and name != "digits" and not settings.download:
        _make(name, root, fetch=False)
    elif name.startswith(PREFIXES):
        return settings.size or 224
    elif name not in DATASETS:
        path = _path(settings.dataset)
        parquet = path.is_file() or any(path.glob("*.parquet"))
        return settings.size or (_parquet(path) if parquet else _folder(path, None)).size
    return settings.size or SIZES[name]


@dataclass(frozen=True)
class _Raw:
    train: Source
    val: Source
    classes: Sequence[str] | None
    size: int
    held_out: bool = False


def _limited(raw: _Raw, settings: TrainSettings, *, flip: bool = True, cifar: bool = False) -> Data:
    """Hold a tenth of each class out where there is no validation set, and apply the limits."""
    if raw.held_out:
        every = range(len(raw.train.labels))
        val: Sequence[int] = [i for i in every if i % 10 == 9]
        train: Sequence[int] = [i for i in every if i % 10 != 9]
    else:
        train, val = range(len(raw.train.labels)), range(len(raw.val.labels))
    parts = []
    limits = (settings.train_limit, settings.val_limit)
    for source, indices, limit in zip((raw.train, raw.val), (train, val), limits, strict=True):
        kept = stratified([source.labels[i] for i in indices], limit)
        whole = limit is None and not raw.held_out
        parts.append(Pictures(source, None if whole else [indices[i] for i in kept]))
    classes = raw.classes
    if classes is None:
        count = settings.num_classes or 1 + max(max(raw.train.labels), max(raw.val.labels))
        classes = [str(i) for i in range(count)]
    small = cifar or (raw.size == 32 and isinstance(raw.train, ParquetSource))
    return Data(parts[0], parts[1], classes, raw.size, flip=flip, cifar=small)


def _path(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        close = did_you_mean(name, DATASETS)
        raise DataError(
            f"dataset must be one of {', '.join(DATASETS)}, a folder of images or parquet files, "
            f"or a name of timm's ({', '.join(PREFIXES)}), got {name!r}{close}"
        )
    return path


def _digits() -> _Raw:
    """scikit-learn's 1,797 digits, 8x8 scaled to 32x32; every fifth one is for validation."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    bilinear = Image.Resampling.BILINEAR
    pictures = [Image.fromarray(p).resize((32, 32), bilinear).convert("RGB") for p in pixels]
    labels = [int(y) for y in bunch.target]
    parts = [
        ListSource(
            [p for i, p in enumerate(pictures) if (i % 5 == 4) is val],
            [y for i, y in enumerate(labels) if (i % 5 == 4) is val],
        )
        for val in (False, True)
    ]
    return _Raw(parts[0], parts[1], [str(c) for c in range(10)], 32)


def _make(name: str, root: Path, *, fetch: bool) -> list[Any]:
    """Make torchvision's training and validation sets, and say what to put where if it cannot."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name)
    where = repr(str(root / (folder or "food-101")))
    if name == "food101":
        where += ", with the folders images and meta"

    def make(download: bool) -> list[Any]:
        if name == "food101":
            sets = [
                datasets.Food101(str(root), split=split, download=download)
                for split in ("train", "test")
            ]
        else:
            sets = [
                create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
                for split in ("train", "validation")
            ]
        return sets

    with contextlib.suppress(RuntimeError):
        return make(False)
    if not fetch:
        raise DataError(f"{name} must be in {where}, and it is not there; --download fetches it")
    try:
        return make(True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} must be in {where}; it could not be downloaded: {error}"
        ) from error


def _cifar(name: str, root: Path, download: bool) -> _Raw:
    train, val = (DatasetSource(part, name) for part in _make(name, root, fetch=download))
    return _Raw(train, val, train.classes, 32)


def _food101(root: Path, download: bool) -> _Raw:
    train, val = (DatasetSource(part, "food101") for part in _make("food101", root, fetch=download))
    return _Raw(train, val, train.classes, 224)


def _named_folder(name: str, root: Path) -> Path:
    if name == "tiny-imagenet":
        found = tiny_imagenet.find_root(root)
        if not tiny_imagenet.is_prepared(found):
            raise DataError(
                f"tiny-imagenet in {str(found)!r} has its images in folders named images, where "
                f"readers see one class; run `rlo-timm prepare tiny-imagenet {found}`"
            )
        return found
    folder = root / "imagenet"
    if not (folder / "train").is_dir():
        raise DataError(
            f"imagenet must be in {str(folder)!r}, as train/WNID/*.JPEG and val/WNID/*.JPEG; "
            "--data-dir says where else"
        )
    return folder


def _folder(root: Path, size: int | None) -> _Raw:
    """Class folders in train/ and val/ (or validation/, test/), or in `root`, a tenth held out."""
    val = next((root / name for name in VALIDATION if (root / name).is_dir()), None)
    train = root / "train"
    if train.is_dir() and val is None:
        raise DataError(f"{str(root)!r} has train but none of {', '.join(VALIDATION)}")
    base = train if train.is_dir() else root
    classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{str(base)!r} must hold a folder of images for each class, at least two, got "
            f"{len(classes)}"
        )
    index = {name: number for number, name in enumerate(classes)}
    source = _images(base, index)
    held_out = not (train.is_dir() and val is not None)
    other = source if held_out else _images(cast("Path", val), index)
    return _Raw(source, other, classes, size or _side(source), held_out=held_out)


def _images(folder: Path, index: dict[str, int]) -> DatasetSource:
    try:
        # Sorted by name, without a search for a split in the folder: it is the split.
        made = create_dataset("", root=str(folder), search_split=False, class_map=index)
    except RuntimeError as error:
        raise DataError(f"no images in the class folders of {str(folder)!r}") from error
    return DatasetSource(made, str(folder))


def _parquet(path: Path) -> _Raw:
    """Files named train* and val* (or validation*, test*), or any, every tenth row held out."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    train = [file for file in files if file.name.startswith("train")]
    first = next((v for v in VALIDATION if any(f.name.startswith(v) for f in files)), None)
    if train and first:
        held = ParquetSource([file for file in files if file.name.startswith(first)])
        source = ParquetSource(train)
        return _Raw(source, held, source.classes, _side(source))
    source = ParquetSource(files)
    return _Raw(source, source, source.classes, _side(source), held_out=True)


def _from_timm(name: str, settings: TrainSettings, seed: int) -> Data:
    """Open what timm's factory knows by a prefix: a data set by number, or a stream."""
    made = []
    for split, training in ((settings.train_split, True), (settings.val_split, False)):
        try:
            part = create_dataset(
                name,
                root=settings.data_dir,
                split=split,
                is_training=training,
                download=settings.download,
                batch_size=settings.batch_size,
                seed=seed,
            )
        except ImportError as error:
            raise DataError(f"dataset {name!r} needs {error.name}: pip install it") from error
        except (AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"dataset {name!r}, split {split!r}: {reason}") from error
        made.append(part)
    train, val = made
    if isinstance(train, IterableDataset):
        if settings.num_classes is None:
            raise DataError(f"dataset {name!r} is a stream; --num-classes says its classes")
        classes = [str(i) for i in range(settings.num_classes)]
        return Data(train, cast("Any", val), classes, settings.size or 224)
    source = DatasetSource(train, name)
    return _limited(
        _Raw(source, DatasetSource(val, name), source.classes, _side(source)),
        settings,
        cifar="cifar" in name.lower(),
    )


def _side(source: Source) -> int:
    """Return the side of the images where they are small squares, and 224 otherwise."""
    width, height = source.sample(0)[0].size
    return width if width == height and width <= 128 else 224
