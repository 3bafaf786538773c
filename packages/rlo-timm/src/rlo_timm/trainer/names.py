"""What the authors call their data sets and networks, in any case and with any dashes.

Imports no torch: the command checks names with it before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "food101", "imagenet", "digits")
"""The data sets that have a name of their own."""

PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
"""What begins a data set's name for `timm.data.create_dataset`."""

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
"""What begins a network's name for `timm.create_model` that is not in timm's own list."""

_DATASETS = {
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "tinyimagenet": "tiny-imagenet",
    "tinyimagenet200": "tiny-imagenet",
    "food101": "food101",
    "imagenet": "imagenet",
    "imagenet1k": "imagenet",
    "ilsvrc2012": "imagenet",
    "digits": "digits",
}
_LOSSES = {"root": "rlo"}
"""Names of losses in the authors' train.py, and ours. Their focal and ce are ours too."""

_NETS = {
    "vgg": "vgg",
    "vgg19": "vgg",
    "vgg19bn": "vgg",
    "vit": "vit",
    "vitb": "vit",
    "vitbase": "vit",
    "vits": "vit_small",
    "vitsmall": "vit_small",
    "vitl": "vit_large",
    "vitlarge": "vit_large",
    "vittimm": "vit_timm",
    "cait": "cait",
    "swin": "swin",
    "swinb": "swin",
    "swinbase": "swin",
    "swint": "swin_tiny",
    "swintiny": "swin_tiny",
    "convmixer": "convmixer",
    "mlpmixer": "mlpmixer",
    "simplevit": "simplevit",
    **{
        f"{stem}{depth}": f"res{depth}" for stem in ("res", "resnet") for depth in (18, 34, 50, 101)
    },
}


def dataset_name(name: str) -> str:
    """Return the data set's own name where `name` is one of its spellings, else `name` itself.

    A folder or a file of that name comes first, so that `--dataset ./cifar10` is a folder.

    Example:
        >>> dataset_name("Tiny-ImageNet"), dataset_name("ImageNet1k")
        ('tiny-imagenet', 'imagenet')
    """
    if "/" in name or "\\" in name:
        return name
    return _DATASETS.get(_folded(name), name)


def net_name(name: str) -> str:
    """Return the authors' name of a network where `name` is one of its spellings, else `name`.

    Example:
        >>> net_name("ViT"), net_name("ResNet-18"), net_name("vit_tiny_patch16_224")
        ('vit', 'res18', 'vit_tiny_patch16_224')
    """
    return _NETS.get(_folded(name), name)


def known_dataset(name: str) -> bool:
    """Tell whether `name` is a data set of ours, one of timm's factory, or a path that is there."""
    return name in DATASETS or name.startswith(PREFIXES) or Path(name).exists()


def authors_loss(spec: str) -> str:
    """Return a spec with the authors' name of its loss replaced by ours.

    Example:
        >>> authors_loss("root:k=8"), authors_loss("focal")
        ('rlo:k=8', 'focal')
    """
    name, colon, rest = spec.partition(":")
    return _LOSSES.get(name.strip().lower(), name) + colon + rest


def did_you_mean(name: str, ours: Iterable[str], theirs: Iterable[str] = ()) -> str:
    """Return `; did you mean 'X'?`, our own names first, or an empty text.

    Example:
        >>> did_you_mean("swim", ["swin", "vit"], ["swin_s3_base_224"])
        "; did you mean 'swin'?"
    """
    for names in (ours, theirs):
        close = difflib.get_close_matches(name.lower(), list(names), n=1)
        if close:
            return f"; did you mean {close[0]!r}?"
    return ""


def spellings(canonical: Mapping[str, str] = _NETS) -> list[str]:
    """Return the names to propose for networks."""
    return sorted(set(canonical.values()))


def _folded(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "").replace(" ", "")
