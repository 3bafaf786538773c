"""From a picture to the tensor that a network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2  # type: ignore[import-untyped]

from rlo_timm.models import CIFAR_MEAN, CIFAR_STD
from rlo_timm.trainer.settings import Settings

Transform = Callable[[Any], torch.Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = 128
"""From this side on pictures are photographs of any shape, which are cropped at random scales."""


def train_transform(
    settings: Settings, own: int, side: int, *, flip: bool, cifar: bool
) -> Transform:
    """Return the augmentation of training pictures.

    Args:
        settings: `augment` and `randaugment` count.
        own: Side of the pictures, in pixels.
        side: Side that the network sees.
        flip: Whether a mirrored picture has the same label.
        cifar: Normalise by CIFAR's statistics instead of ImageNet's.
    """
    if not settings.augment:
        return val_transform(own, side, cifar=cifar)
    steps: list[Any] = [v2.RGB()]
    if own >= LARGE:
        steps.append(v2.RandomResizedCrop(side, antialias=True))
    else:
        if side != own:
            steps.append(v2.Resize((side, side), antialias=True))
        steps.append(v2.RandomCrop(side, padding=max(1, side // 8)))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if settings.randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=14))
    return _composed(steps, cifar)


def val_transform(own: int, side: int, *, cifar: bool) -> Transform:
    """Return the transform of validation pictures; args as `train_transform`."""
    steps: list[Any] = [v2.RGB()]
    if own >= LARGE:  # the usual 256 / 224
        steps += [v2.Resize(round(side * 256 / 224), antialias=True), v2.CenterCrop(side)]
    else:
        steps.append(v2.Resize((side, side), antialias=True))
    return _composed(steps, cifar)


def _composed(steps: list[Any], cifar: bool) -> Transform:
    mean, std = (CIFAR_MEAN, CIFAR_STD) if cifar else (IMAGENET_MEAN, IMAGENET_STD)
    composed: Transform = v2.Compose(
        [
            *steps,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.ToPureTensor(),
        ]
    )
    return composed
