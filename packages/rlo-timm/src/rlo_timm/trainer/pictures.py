"""Labelled pictures from any source, as torch data sets with a transform."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rlo_core.errors import DataError
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_COLUMNS = ("img", "image", "images", "picture", "pixels")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "y")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


class Source(Protocol):
    """Pictures by number; decoding is done when one is asked for."""

    labels: Sequence[int]

    def image(self, index: int) -> Image:
        """Return one picture."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """The first `limit` pictures of a source, each transformed when it is asked for.

    With a `seed` the transform's random numbers depend on it, on `epoch` and on the picture alone:
    not on the process that does it, nor on how many came before.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        *,
        limit: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed, self.epoch = seed, 0
        self.length = min(len(source.labels), limit or len(source.labels))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        image, label = self.source.image(index), int(self.source.labels[index])
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.epoch, index)))  # of integers: always the same
            return self.transform(image), label

    def fingerprint(self) -> str:
        """Return a hash of the labels and of the first, middle and last pictures."""
        digest = hashlib.sha256(bytes(str(list(self.source.labels[: self.length])), "ascii"))
        for index in sorted({0, self.length // 2, self.length - 1}):
            digest.update(self.source.image(index).convert("RGB").tobytes())
        return digest.hexdigest()[:16]


class ParquetSource:
    """An image column (encoded bytes, or a struct with `bytes`) and a label column.

    Raises:
        DataError: no pyarrow, no such columns, or labels that are not integers from 0.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(
                "parquet files need pyarrow: pip install 'rlo-timm[parquet]'"
            ) from error
        tables = [pq.read_table(file) for file in files]
        names = tables[0].column_names
        image = _column(names, IMAGE_COLUMNS, "image", files[0])
        label = _column(names, LABEL_COLUMNS, "label", files[0])
        self._bytes: list[bytes] = []
        labels: list[Any] = []
        for table in tables:
            rows = table[image].to_pylist()
            self._bytes += [row["bytes"] if isinstance(row, dict) else row for row in rows]
            labels += table[label].to_pylist()
        if not all(isinstance(value, int) and value >= 0 for value in labels):
            raise DataError(f"column {label!r} of {str(files[0])!r} must hold integers from 0")
        self.labels: Sequence[int] = labels
        self.classes = _class_names(tables[0].schema.metadata or {}, label)

    def image(self, index: int) -> Image:
        from PIL import Image as Pillow

        with Pillow.open(io.BytesIO(self._bytes[index])) as picture:
            return picture.convert("RGB")


def _column(names: Sequence[str], known: Sequence[str], what: str, file: Path) -> str:
    for name in known:
        if name in names:
            return name
    raise DataError(
        f"{str(file)!r} has no {what} column: looked for {', '.join(known)}, got {', '.join(names)}"
    )


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """Return the names that a Hugging Face data set keeps in its parquet files."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None


class FolderSource:
    """`ROOT/CLASS/...image`: classes are the folders of `classes`, in their order."""

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.classes: list[str] | None = list(classes)
        found = [(path, i) for i, name in enumerate(classes) for path in images_in(root / name)]
        if not found:
            raise DataError(f"no images in the class folders of {str(root)!r}")
        self._paths = [path for path, _ in found]
        self.labels: Sequence[int] = [label for _, label in found]

    def image(self, index: int) -> Image:
        from PIL import Image as Pillow

        with Pillow.open(self._paths[index]) as picture:  # it holds the file until it is decoded
            return picture.convert("RGB")


def images_in(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)


class ListSource:
    """Pictures that are in memory or in a torchvision data set, by a function of the index."""

    def __init__(
        self, picture: Callable[[int], Image], labels: Sequence[int], classes: Sequence[str]
    ) -> None:
        self._picture = picture
        self.labels = labels
        self.classes: list[str] | None = list(classes)

    def image(self, index: int) -> Image:
        return self._picture(index)


class PartSource:
    """Some of the pictures of another source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices
        self.labels: Sequence[int] = [source.labels[i] for i in indices]

    def image(self, index: int) -> Image:
        return self._source.image(self._indices[index])
