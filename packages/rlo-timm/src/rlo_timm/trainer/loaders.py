"""timm's loaders over our pictures, with an order and an augmentation that a seed decides.

`timm.data.create_loader` makes the transforms, the collation and the prefetcher. Its sampler is
replaced: ours names the pictures of each batch, and the seed of their augmentation, from the seed,
the epoch and the batch's number alone. So neither the number of workers nor a resume changes a run,
and validation counts each picture once on any number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from timm.data.loader import create_loader, fast_collate
from timm.data.transforms import ToNumpy
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torchvision import transforms  # type: ignore[import-untyped]

from rlo_timm.models import CIFAR_MEAN, CIFAR_STD
from rlo_timm.trainer.data import Data
from rlo_timm.trainer.nets import SMALL
from rlo_timm.trainer.pictures import Batch, Pictures
from rlo_timm.trainer.settings import TrainSettings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inputs:
    """What a network wants its images to be.

    Args:
        size: Side in pixels.
        mean: Of each channel, of images in [0, 1].
        std: The same.
        interpolation: Of resizing.
        crop_pct: Share of a validation image that is seen.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0


def inputs_of(settings: TrainSettings, data: Data, net: Any, side: int) -> Inputs:
    """Return a pretrained network's own statistics, interpolation and crop, or the data set's."""
    own = settings.net.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if settings.pretrained or own:
        from timm.data.config import resolve_data_config

        config = resolve_data_config({}, model=net)  # type: ignore[no-untyped-call]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        interpolation, crop = str(config["interpolation"]), float(config["crop_pct"])
    else:
        mean, std = (CIFAR_MEAN, CIFAR_STD) if data.cifar else (IMAGENET_MEAN, IMAGENET_STD)
        interpolation, crop = "bilinear", 0.875 if data.size >= SMALL else 1.0
    return Inputs(
        side,
        mean,
        std,
        settings.interpolation or interpolation,
        settings.crop_pct or crop,
    )


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches for one of `world` devices, each with the seed of its augmentation.

    Every device gets as many batches; up to `world - 1` pictures come twice for that. A last batch
    of one picture is left out, where it is not the only one: batch norm cannot take it.
    """

    def __init__(
        self, pictures: Pictures, batch_size: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.pictures, self.batch_size = pictures, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        each = math.ceil(len(self.pictures) / self.world)
        batches = math.ceil(each / self.batch_size)
        alone = each % self.batch_size == 1 and self.batch_size > 1 and batches > 1
        return batches - alone

    def order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return this epoch's order; pictures of one block of a file stay near one another."""
        random = np.random.default_rng((self.seed, self.epoch))
        blocks = self.pictures.blocks()
        if len(blocks) == 1:
            return random.permutation(len(self.pictures))
        shuffled = [np.asarray(blocks[i]) for i in random.permutation(len(blocks))]
        pairs = [np.concatenate(shuffled[i : i + 2]) for i in range(0, len(shuffled), 2)]
        return np.concatenate([random.permutation(pair) for pair in pairs])

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        missing = -len(order) % self.world
        mine = np.concatenate([order, order[:missing]])[self.rank :: self.world].tolist()
        random = np.random.default_rng((self.seed, self.epoch, self.rank, 1))
        for number, seed in enumerate(random.integers(2**63, size=len(self)).tolist()):
            start = number * self.batch_size
            batch = Batch(mine[start : start + self.batch_size])
            batch.seed = seed
            yield batch


class ValBatches(Sampler[list[int]]):
    """Each picture once: as many batches on every device, of sizes that differ by one at most."""

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        each = min(math.ceil(count / (batch_size * world)), count // world)
        self._batches = np.array_split(np.arange(count), world * max(1, each))[rank::world]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self._batches])


class Loaders(pl.LightningDataModule):
    """The loaders of a run; `epoch` is told before each one begins."""

    def __init__(self, data: Data, settings: TrainSettings, inputs: Inputs, seed: int) -> None:
        super().__init__()
        self.data, self.settings, self.inputs, self.seed = data, settings, inputs, seed
        self._batches: TrainBatches | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of an epoch."""
        if self._batches is not None:
            self._batches.epoch = epoch

    def train_dataloader(self) -> Any:
        """Return the training loader of this device."""
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = None
        if isinstance(self.data.train, Pictures):
            batches = self._batches = TrainBatches(
                self.data.train, self.settings.batch_size, seed=self.seed, rank=rank, world=world
            )
        return train_loader(
            self.data, self.settings, self.inputs, batches, self.trainer.strategy.root_device
        )

    def val_dataloader(self) -> Any:
        """Return the validation loader of this device."""
        assert self.trainer is not None
        return val_loader(
            self.data.val,
            self.inputs,
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            device=self.trainer.strategy.root_device,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )


def train_loader(
    data: Data,
    settings: TrainSettings,
    inputs: Inputs,
    batches: TrainBatches | None,
    device: torch.device,
) -> Any:
    """Return timm's loader of augmented, normalised training batches on a device."""
    crop = settings.train_crop_mode or ("pad" if data.size < SMALL else "rrc")
    flip = settings.hflip if data.flip else 0.0
    loader = create_loader(
        cast("Any", data.train),
        input_size=(3, inputs.size, inputs.size),
        batch_size=settings.batch_size,
        is_training=True,
        no_aug=not settings.augment,
        re_prob=settings.reprob,
        re_mode=settings.remode,
        train_crop_mode=None if crop == "pad" else crop,
        hflip=flip,
        vflip=settings.vflip,
        color_jitter=cast("Any", settings.color_jitter or None),
        auto_augment=settings.aa,
        interpolation=inputs.interpolation,
        mean=inputs.mean,
        std=inputs.std,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    if settings.augment and (crop == "pad" or settings.randaugment):
        dataset: Any = data.train
        dataset.transform = _authors(
            settings, inputs, dataset.transform, pad=crop == "pad", flip=flip
        )
    if batches is not None:
        _take_batches(loader, batches)
    return loader


def _authors(
    settings: TrainSettings, inputs: Inputs, theirs: Any, *, pad: bool, flip: float
) -> Any:
    """Return the authors' augmentation: a crop of the padded image, a flip, RandAugment or not."""
    if not pad:  # timm's crop and flip come first, its conversion to an array last
        *steps, last = theirs.transforms
        return transforms.Compose([*steps, transforms.RandAugment(2, 14), last])
    if settings.aa or settings.color_jitter:  # timm's own steps, after its crop and flip
        first = next(i for i, t in enumerate(theirs.transforms) if "Crop" in type(t).__name__)
        rest = [t for t in theirs.transforms[first + 1 :] if "Flip" not in type(t).__name__]
    else:
        rest = [*([transforms.RandAugment(2, 14)] if settings.randaugment else []), ToNumpy()]
    steps = [_Resize(inputs.size), transforms.RandomCrop(inputs.size, max(1, inputs.size // 8))]
    if flip:
        steps.append(transforms.RandomHorizontalFlip(flip))
    if settings.vflip:
        steps.append(transforms.RandomVerticalFlip(settings.vflip))
    return transforms.Compose([*steps, *rest])


class _Resize:
    """Resize to a square, unless the image is that already."""

    def __init__(self, side: int) -> None:
        self._side = (side, side)

    def __call__(self, image: Any) -> Any:
        return image if image.size == self._side else image.resize(self._side, 2)  # bilinear


def val_loader(
    pictures: Pictures | IterableDataset[Any],
    inputs: Inputs,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Any:
    """Return timm's loader of normalised validation batches on a device."""
    loader = create_loader(
        cast("Any", pictures),
        input_size=(3, inputs.size, inputs.size),
        batch_size=batch_size,
        interpolation=inputs.interpolation,
        mean=inputs.mean,
        std=inputs.std,
        num_workers=workers,
        crop_pct=inputs.crop_pct,
        pin_memory=device.type == "cuda",
        device=device,
    )
    if isinstance(pictures, Pictures):
        _take_batches(loader, ValBatches(len(pictures), batch_size, rank=rank, world=world))
    return loader


def collate(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images (N, 3, H, W) and labels (N,), as timm's `fast_collate` does.

    Stacked at once: it clears a batch first and then adds the images to it one by one.
    """
    images, labels = zip(*samples, strict=True)
    if isinstance(images[0], np.ndarray):
        # In rows of a channel: numpy would keep the pixels' order, which is slow to normalise.
        stacked = np.empty((len(images), *images[0].shape), dtype=images[0].dtype)
        batch = torch.from_numpy(np.stack(images, out=stacked))
    elif isinstance(images[0], torch.Tensor):
        batch = torch.stack(images)
    else:  # several augmentations of one image
        collate: Any = fast_collate  # which has no types
        made: tuple[torch.Tensor, torch.Tensor] = collate(samples)
        return made
    return batch, torch.tensor(labels)


def _take_batches(loader: Any, batches: Sampler[list[int]]) -> None:
    """Put our batches in place of the sampler of timm's loader."""
    old = loader.loader
    loader.loader = DataLoader(
        old.dataset,
        batch_sampler=batches,
        num_workers=old.num_workers,
        collate_fn=collate if old.collate_fn is fast_collate else old.collate_fn,
        pin_memory=old.pin_memory,
        worker_init_fn=old.worker_init_fn,
        persistent_workers=old.persistent_workers,
        generator=torch.Generator().manual_seed(0),  # not the one that dropout draws on
    )
