"""Labelled pictures from any source, as one torch data set that timm's loader takes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from rlo_core.errors import DataError
from torch.utils.data import Dataset, get_worker_info

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_COLUMNS = ("img", "image", "images", "picture", "pixels")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "y")
IN_MEMORY_BYTES = 2 * 1024**3
"""Parquet files of more pictures than this are read row group by row group."""


class Source(Protocol):
    """Pictures by number; decoding is done when one is asked for."""

    labels: Sequence[int]

    def sample(self, index: int) -> tuple[Image, int]:
        """Return one picture and its label."""


class Batch(list[int]):
    """The picture numbers of one batch, and the seed of its random numbers (None: none are drawn).

    It is what a worker is sent, so augmentation depends on the batch and not on the worker.
    """

    seed: int | None = None


class Pictures(Dataset[tuple[Any, int]]):
    """Pictures `indices` of a source; `transform` is set by timm's `create_loader`.

    Asked for a `Batch`, it seeds the three generators that transforms draw from (Python's, numpy's
    and torch's) once, and in the training process puts them back afterwards: a batch is the same
    with any number of workers. Seeding each picture costs more than decoding a small one.
    """

    def __init__(self, source: Source, indices: Sequence[int] | None = None) -> None:
        self.source = source
        self.indices = range(len(source.labels)) if indices is None else indices
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, label = self.source.sample(self.indices[index])
        return (image if self.transform is None else self.transform(image)), label

    def __getitems__(self, batch: list[int]) -> list[tuple[Any, int]]:
        """Return the samples of a batch (torch's loader asks for them at once)."""
        with _seeded(getattr(batch, "seed", None)):
            return [self[index] for index in batch]

    def labels(self) -> list[int]:
        """Return the label of each picture."""
        return [int(self.source.labels[i]) for i in self.indices]

    def blocks(self) -> list[range]:
        """Return the ranges that are best read together: one, or a row group each."""
        groups: list[range] | None = getattr(self.source, "groups", None)
        whole = range(len(self))
        return groups if groups and len(self) == len(self.source.labels) else [whole]

    def fingerprint(self) -> str:
        """Return a hash of the labels and of the first, middle and last pictures."""
        digest = hashlib.sha256(bytes(str(self.labels()), "ascii"))
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            image, _ = self.source.sample(self.indices[index])
            digest.update(image.convert("RGB").tobytes())
        return digest.hexdigest()[:16]


_generator: Any = np.random  # whose types leave these two functions out
_GENERATOR = np.random.MT19937()
"""What transforms draw on through `np.random` in the training process."""


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    own = get_worker_info() is None
    if own:
        # numpy's generator is exchanged: to read its state and to put it back takes 0.5 ms.
        before = random.getstate(), _generator.get_bit_generator(), torch.get_rng_state()
        _generator.set_bit_generator(_GENERATOR)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPU's too
    try:
        yield
    finally:
        if own:
            random.setstate(before[0])
            _generator.set_bit_generator(before[1])
            torch.set_rng_state(before[2])


def stratified(labels: Sequence[int], limit: int | None) -> Sequence[int]:
    """Return the numbers of `limit` pictures, in order, with each class's share of the whole.

    The first pictures of each class are taken. Without a limit, or with one that is no limit, all.

    Example:
        >>> list(stratified([0, 0, 0, 0, 1, 1], 3))
        [0, 1, 4]
    """
    count = len(labels)
    if limit is None or limit >= count:
        return range(count)
    array = np.asarray(labels)
    order = np.argsort(array, kind="stable")  # class by class, in the data's order
    # Position of each picture within its class over the size of the class: the smallest are taken.
    sizes = np.bincount(array)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    share = (np.arange(count) - starts[array[order]] + 0.5) / sizes[array[order]]
    taken = order[np.argsort(share, kind="stable")[:limit]]
    return [int(i) for i in np.sort(taken)]


class ParquetSource:
    """An image column (encoded bytes, or a struct with `bytes`) and a label column.

    The bytes stay in Arrow's memory; files of more than `IN_MEMORY_BYTES` stay on disk, and a row
    group is read when one of its pictures is asked for.

    Raises:
        DataError: no pyarrow, no such columns, or labels that are not integers from 0.
    """

    def __init__(self, files: Sequence[Path], *, in_memory: int = IN_MEMORY_BYTES) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(
                "parquet files need pyarrow: pip install 'rlo-timm[parquet]'"
            ) from error
        opened = [pq.ParquetFile(file, memory_map=True) for file in files]
        names = opened[0].schema_arrow.names
        self._image = _column(names, IMAGE_COLUMNS, "image", files[0])
        label = _column(names, LABEL_COLUMNS, "label", files[0])
        labels: list[Any] = []
        for file in opened:
            labels += file.read([label])[label].to_pylist()
        if not all(isinstance(value, int) and value >= 0 for value in labels):
            raise DataError(f"column {label!r} of {str(files[0])!r} must hold integers from 0")
        self.labels: Sequence[int] = labels
        self.classes = _class_names(opened[0].schema_arrow.metadata or {}, label)
        self._files = list(files)
        metas = [
            (f, g, o.metadata.row_group(g))
            for f, o in enumerate(opened)
            for g in range(o.num_row_groups)
        ]
        self._groups = [(file, group) for file, group, _ in metas]
        rows = np.cumsum([0, *(meta.num_rows for _, _, meta in metas)])
        self._starts = rows[:-1]
        size = sum(meta.total_byte_size for _, _, meta in metas)
        self._kept = len(metas) if size <= in_memory else 2
        streams = size > in_memory
        self.groups = [range(a, b) for a, b in itertools.pairwise(rows)] if streams else None
        self._read: dict[int, Any] = {}

    def sample(self, index: int) -> tuple[Image, int]:
        from PIL import Image as Pillow

        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        cell = self._column_of(group)[index - int(self._starts[group])].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        with Pillow.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB"), self.labels[index]

    def _column_of(self, group: int) -> Any:
        if group not in self._read:
            import pyarrow.parquet as pq

            while len(self._read) >= self._kept:
                self._read.pop(next(iter(self._read)))
            file, number = self._groups[group]
            table = pq.ParquetFile(self._files[file], memory_map=True).read_row_group(
                number, [self._image]
            )
            self._read[group] = table[self._image]
        return self._read[group]


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


class DatasetSource:
    """A data set of timm or torchvision that has its labels at hand."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.labels: Sequence[int] = _labels_of(dataset, name)
        self.classes = _classes_of(dataset)
        reader = getattr(dataset, "reader", None)
        self._files: Any = reader if hasattr(reader, "samples") else None

    def sample(self, index: int) -> tuple[Image, int]:
        if self._files is not None:  # timm leaves its files to be closed by whoever comes by
            from PIL import Image as Pillow

            file, label = self._files[index]
            with contextlib.suppress(OSError), file:
                return Pillow.open(file).convert("RGB"), int(label)
        image, label = self.dataset[index]  # timm's own, which passes over what it cannot read
        return image, int(label)


def _labels_of(dataset: Any, name: str) -> Sequence[int]:
    """Return the labels without decoding a picture."""
    reader = getattr(dataset, "reader", None)
    samples = getattr(reader, "samples", None)
    if samples is not None:  # folders, tar files
        return [int(label) for _, label in samples]
    table, key = getattr(reader, "dataset", None), getattr(reader, "label_key", None)
    if table is not None and key is not None:  # hfds/
        return [int(label) for label in table[key]]
    for attribute in ("targets", "_labels", "labels"):  # torchvision
        if (found := getattr(dataset, attribute, None)) is not None:
            return [int(label) for label in found]
    raise DataError(f"dataset {name!r} does not say its labels ({type(dataset).__name__})")


def _classes_of(dataset: Any) -> list[str] | None:
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if index:
        return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]
    features = getattr(getattr(reader, "dataset", None), "features", None)
    names = getattr((features or {}).get(getattr(reader, "label_key", "")), "names", None)
    return list(names) if names else None


class ListSource:
    """Pictures that are in memory."""

    def __init__(self, pictures: Sequence[Image], labels: Sequence[int]) -> None:
        self._pictures = pictures
        self.labels = labels

    def sample(self, index: int) -> tuple[Image, int]:
        return self._pictures[index], self.labels[index]
