"""The data sets of `rlo-timm train`: what each is, and where it has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_core.errors import DataError
from torchvision import datasets  # type: ignore[import-untyped]

from rlo_timm.trainer import tiny_imagenet
from rlo_timm.trainer.pictures import (
    FolderSource,
    ListSource,
    ParquetSource,
    PartSource,
    Pictures,
    Source,
)
from rlo_timm.trainer.settings import Settings
from rlo_timm.trainer.transforms import train_transform, val_transform

if TYPE_CHECKING:
    from PIL.Image import Image

NAMED = ("cifar10", "cifar100", "tiny-imagenet", "food101", "imagenet", "digits")
_VALIDATION = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class Raw:
    """A data set before its transforms."""

    train: Source
    val: Source
    classes: Sequence[str]
    size: int
    flip: bool = True
    cifar: bool = False


@dataclass(frozen=True)
class Data:
    """A data set that is ready to train on."""

    train: Pictures
    val: Pictures
    classes: Sequence[str]
    size: int

    def describe(self, name: str) -> dict[str, Any]:
        """Return what identifies it in run.json."""
        return {
            "name": name,
            "train": len(self.train),
            "val": len(self.val),
            "classes": len(self.classes),
            "size": self.size,
            "fingerprint": f"{self.train.fingerprint()}-{self.val.fingerprint()}",
        }


def load_data(settings: Settings, *, size: int | None = None, seed: int = 0) -> Data:
    """Load the data set that the settings name.

    Args:
        settings: dataset, data_dir, download, size, augment, randaugment and the limits count.
        size: The side that the network works at, over the data set's own.
        seed: Of the augmentation.

    Raises:
        DataError: it is not there (and what to put where), or not laid out as expected.
    """
    raw = _raw(settings)
    side = size or settings.size or raw.size
    return Data(
        Pictures(
            raw.train,
            train_transform(settings, raw.size, side, flip=raw.flip, cifar=raw.cifar),
            limit=settings.train_limit,
            seed=seed,
        ),
        Pictures(raw.val, val_transform(raw.size, side, cifar=raw.cifar), limit=settings.val_limit),
        raw.classes,
        side,
    )


def own_size(settings: Settings) -> int:
    """Return the image side of the data set, without loading it where its name says it."""
    sizes = {"cifar10": 32, "cifar100": 32, "digits": 32, "tiny-imagenet": 64}
    return settings.size or sizes.get(settings.dataset) or _raw(settings).size


def _raw(settings: Settings) -> Raw:
    root = Path(settings.data_dir)
    if settings.dataset == "digits":
        return _digits()
    if settings.dataset in ("cifar10", "cifar100"):
        return _cifar(settings.dataset, root, settings.download)
    if settings.dataset == "food101":
        return _food101(root, settings.download)
    if settings.dataset == "tiny-imagenet":
        found = tiny_imagenet.find_root(root)
        if not tiny_imagenet.is_prepared(found):
            raise DataError(
                f"tiny-imagenet in {str(found)!r} has its images in folders named images, where "
                f"readers see one class; run `rlo-timm prepare tiny-imagenet {found}`"
            )
        return _folder(found, size=64)
    if settings.dataset == "imagenet":
        folder = root / "imagenet"
        if not (folder / "train").is_dir():
            raise DataError(
                f"imagenet must be in {str(folder)!r}, as train/WNID/*.JPEG and val/WNID/*.JPEG; "
                "--data-dir says where else"
            )
        return _folder(folder, size=224)
    path = Path(settings.dataset)
    if not path.exists():
        raise DataError(
            f"dataset must be one of {', '.join(NAMED)}, or a folder of images or parquet files, "
            f"got {settings.dataset!r}"
        )
    if path.is_file() or any(path.glob("*.parquet")):
        return _parquet(path)
    return _folder(path, size=None)


def _digits() -> Raw:
    """scikit-learn's 1,797 digits, 8x8 scaled to 32x32; every fifth one is for validation."""
    import numpy as np
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    pictures = [Pillow.fromarray(p).resize((32, 32), Pillow.Resampling.BILINEAR) for p in pixels]
    whole = ListSource(
        pictures.__getitem__, [int(y) for y in bunch.target], [str(c) for c in range(10)]
    )
    parts = [[i for i in range(len(pictures)) if (i % 5 == 4) is val] for val in (False, True)]
    train, val = (PartSource(whole, part) for part in parts)
    return Raw(train, val, [str(c) for c in range(10)], 32, flip=False)


def _torchvision(
    make: Callable[[bool], Any], name: str, root: Path, download: bool, where: str
) -> Any:
    """Make a torchvision data set, and say what to put where if it cannot."""
    try:
        return make(False)
    except RuntimeError:
        pass
    if not download:
        raise DataError(f"{name} must be in {where}, and it is not there; --download fetches it")
    try:
        return make(True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} must be in {where}; it could not be downloaded: {error}"
        ) from error


def _cifar(name: str, root: Path, download: bool) -> Raw:
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    where = repr(str(root / kind.base_folder))
    parts = [
        _torchvision(
            lambda fetch, train=train: kind(str(root), train=train, download=fetch),  # type: ignore[misc]
            name,
            root,
            download,
            where,
        )
        for train in (True, False)
    ]
    sources = [_arrays(part) for part in parts]
    return Raw(sources[0], sources[1], parts[0].classes, 32, cifar=True)


def _arrays(part: Any) -> ListSource:
    from PIL import Image as Pillow

    def picture(index: int) -> Image:
        return Pillow.fromarray(part.data[index])

    return ListSource(picture, part.targets, part.classes)


def _food101(root: Path, download: bool) -> Raw:
    where = f"{str(root / 'food-101')!r}, with the folders images and meta"
    parts = [
        _torchvision(
            lambda fetch, split=split: datasets.Food101(str(root), split=split, download=fetch),  # type: ignore[misc]
            "food101",
            root,
            download,
            where,
        )
        for split in ("train", "test")
    ]
    sources = [
        ListSource(lambda i, part=part: part[i][0], part._labels, part.classes)  # type: ignore[misc]
        for part in parts
    ]
    return Raw(sources[0], sources[1], parts[0].classes, 224)


def _folder(root: Path, *, size: int | None) -> Raw:
    """Class folders in train/ and val/ (or validation/, test/), or in `root`, a tenth held out."""
    val = next((root / name for name in _VALIDATION if (root / name).is_dir()), None)
    train = root / "train"
    if train.is_dir() and val is None:
        raise DataError(f"{str(root)!r} has train but none of {', '.join(_VALIDATION)}")
    base = train if train.is_dir() else root
    classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{str(base)!r} must hold a folder of images for each class, at least two, got "
            f"{len(classes)}"
        )
    source = FolderSource(base, classes)
    if train.is_dir() and val is not None:
        return Raw(source, FolderSource(val, classes), classes, size or _side(source))
    held = [[i for i in range(len(source.labels)) if (i % 10 == 9) is out] for out in (False, True)]
    kept, out = (PartSource(source, part) for part in held)
    return Raw(kept, out, classes, size or _side(source))


def _parquet(path: Path) -> Raw:
    """Files named train* and val* (or validation*, test*), or any, every tenth row held out."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    train = [file for file in files if file.name.startswith("train")]
    val = [file for name in _VALIDATION for file in files if file.name.startswith(name)]
    if train and val:
        first = next(name for name in _VALIDATION if any(f.name.startswith(name) for f in val))
        val = [file for file in val if file.name.startswith(first)]
        source, held = ParquetSource(train), ParquetSource(val)
        classes = source.classes or _numbered([*source.labels, *held.labels])
        return Raw(source, held, classes, _side(source), cifar=_side(source) == 32)
    source = ParquetSource(files)
    parts = [[i for i in range(len(source.labels)) if (i % 10 == 9) is v] for v in (False, True)]
    kept, out = (PartSource(source, part) for part in parts)
    classes = source.classes or _numbered(source.labels)
    return Raw(kept, out, classes, _side(source), cifar=_side(source) == 32)


def _numbered(labels: Sequence[int]) -> list[str]:
    return [str(i) for i in range(max(labels) + 1)]


def _side(source: Source) -> int:
    """Return the side of the images where they are small squares, and 224 otherwise."""
    width, height = source.image(0).size
    return width if width == height and width <= 128 else 224
