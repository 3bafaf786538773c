"""Tiny-ImageNet's layout, and the one that every image folder reader understands.

As it is packed, training images are in `train/WNID/images/` and validation images in one folder
beside `val_annotations.txt`. timm's default reader then finds one class, `images`, in silence.
Prepared, both are `SPLIT/WNID/*.JPEG`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rlo_core.errors import DataError

ROOT = "tiny-imagenet-200"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did (or would do): images moved, and classes and images that there are now."""

    root: Path
    moved: int
    classes: int
    train: int
    val: int


def find_root(folder: Path) -> Path:
    """Return the folder that has train/ and val/: `folder`, or `tiny-imagenet-200` in it.

    Raises:
        DataError: it is in neither.
    """
    for root in (folder, folder / ROOT):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise DataError(
        f"tiny-imagenet must be unpacked in {str(folder / ROOT)!r}, with the folders train and "
        "val; its archive is tiny-imagenet-200.zip"
    )


def is_prepared(root: Path) -> bool:
    """Tell whether both splits have their images directly in class folders."""
    return not (root / "val" / "images").is_dir() and not any(
        (folder / "images").is_dir() for folder in (root / "train").iterdir() if folder.is_dir()
    )


def prepare(folder: Path, *, dry_run: bool = False) -> Prepared:
    """Move the images into class folders; done again, or after it was stopped, it goes on.

    Args:
        folder: The data set, or the folder that it was unpacked in.
        dry_run: Only count.

    Raises:
        DataError: it is not there, or a validation image has no annotation.
    """
    root = find_root(folder)
    moves = [*_train_moves(root), *_val_moves(root)]
    if not dry_run:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        for empty in [root / "val" / "images", *(root / "train").glob("*/images")]:
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    classes = [path for path in (root / "train").iterdir() if path.is_dir()]
    return Prepared(
        root,
        moved=len(moves),
        classes=len(classes),
        train=len(list((root / "train").rglob("*.JPEG"))),
        val=len(list((root / "val").rglob("*.JPEG"))),
    )


def _train_moves(root: Path) -> list[tuple[Path, Path]]:
    found = sorted((root / "train").glob("*/images/*"))
    return [(path, path.parent.parent / path.name) for path in found]


def _val_moves(root: Path) -> list[tuple[Path, Path]]:
    images = sorted((root / "val" / "images").glob("*"))
    if not images:
        return []
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(f"{str(annotations)!r} is not there; it says the class of each image")
    rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
    wnid = {row[0]: row[1] for row in rows if len(row) > 1}
    unknown = [path.name for path in images if path.name not in wnid]
    if unknown:
        raise DataError(f"{str(annotations)!r} has no class for {unknown[0]!r}")
    return [(path, root / "val" / wnid[path.name] / path.name) for path in images]
