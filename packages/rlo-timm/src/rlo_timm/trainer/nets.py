"""The authors' names of networks, and the timm models that they are, built for the image size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.errors import HFValidationError
from rlo_core.errors import RLOError
from torch import nn

import rlo_timm.models  # noqa: F401  (registers NAME_cifar)
from rlo_timm.trainer.names import HUB_PREFIXES, did_you_mean, net_name


class NetError(RLOError):
    """A network that timm does not have, or that cannot be built for the images."""


Options = dict[str, Any]
SMALL = 128
"""Images of fewer pixels a side are small: CIFAR stems, patches of 4."""


def _patches(size: int) -> Options:
    """Patches of a transformer: 4 pixels up to 64, 16 from 128 on, as the authors' 32 / 4."""
    return {"img_size": size, "patch_size": 4 if size <= 64 else 8 if size < 128 else 16}


def _windows(size: int) -> Options:
    """Swin halves its map three times: 2-pixel patches and windows of 4 at 32, stock at 224."""
    if size >= 192:
        return {"img_size": size}
    return {"img_size": size, "patch_size": 2, "window_size": 4}


def _image(size: int) -> Options:
    return {"img_size": size}


def _nothing(size: int) -> Options:
    return {}


@dataclass(frozen=True)
class Net:
    """One of the authors' networks.

    Args:
        large: timm's model for images of 128 pixels and more.
        options: Its keywords for an image size.
        small: timm's model below 128 pixels, where it is another one.
        size: The image size that it works at whatever the data set's, None for the data set's.
        stems: `large` and `small` are one network with an ImageNet and with a CIFAR stem.
    """

    large: str
    options: Callable[[int], Options] = _nothing
    small: str | None = None
    size: int | None = None
    stems: bool = False

    def model(self, size: int, stem: str = "auto") -> str:
        """Return the name of the timm model for an image size."""
        if self.stems and stem != "auto":
            return self.large if stem == "imagenet" or self.small is None else self.small
        return self.small if self.small is not None and size < SMALL else self.large


NETS: dict[str, Net] = {
    "vgg": Net("vgg19_bn", small="vgg19_bn_cifar", stems=True),
    "res18": Net("resnet18", small="resnet18_cifar", stems=True),
    "res34": Net("resnet34", small="resnet34_cifar", stems=True),
    "res50": Net("resnet50", small="resnet50_cifar", stems=True),
    "res101": Net("resnet101", small="resnet101_cifar", stems=True),
    "vit": Net("vit_base_patch16_224", _patches),
    "vit_small": Net("vit_small_patch16_224", _patches),
    "vit_large": Net("vit_large_patch16_224", _patches),
    "vit_timm": Net("vit_base_patch16_384", _image, size=384),
    "cait": Net("cait_xxs24_224", _patches),
    "swin": Net("swin_base_patch4_window7_224", _windows),
    "swin_tiny": Net("swin_tiny_patch4_window7_224", _windows),
    "convmixer": Net("convmixer_768_32", small="convmixer_256_16_cifar"),
    "mlpmixer": Net("mixer_s16_224", _image, small="mixer_s4_cifar"),
    "simplevit": Net(
        "vit_small_patch16_224",
        lambda size: {**_patches(size), "class_token": False, "global_pool": "avg"},
    ),
}


def image_size(net: str, size: int, *, pretrained: bool = False) -> int:
    """Return the side at which a network sees images of `size` pixels.

    With timm's weights that is the side they were trained at, where it is known without a network.
    """
    known = NETS.get(net_name(net))
    if known is not None and known.size:
        return known.size
    if not pretrained or net.startswith(HUB_PREFIXES):
        return size
    cfg = timm.get_pretrained_cfg(known.large if known else net, allow_unregistered=True)
    return int(cfg.input_size[-1]) if cfg is not None else size


def learning_rate(net: str) -> float:
    """Return the authors' step size: 1e-3 for ResNets, 1e-4 for everything else."""
    return 1e-3 if net_name(net).startswith("res") else 1e-4


def check_net(net: str) -> None:
    """Raise NetError for a network that is neither ours nor timm's."""
    if net.startswith(HUB_PREFIXES) or net_name(net) in NETS:
        return
    if "/" in net:
        raise NetError(f"unknown net {net!r}; a model of the hub is written hf-hub:{net}")
    if not timm.is_model(timm.models.get_arch_name(net)):
        close = did_you_mean(net, NETS, timm.list_models()) or ";"
        raise NetError(
            f"unknown net {net!r}{close} there are {', '.join(NETS)}, and every timm model"
        )


def stem_of(net: str, size: int, stem: str) -> str | None:
    """Return which stem a network gets, `imagenet` or `cifar`; None where it has only one.

    Raises:
        NetError: a stem is asked for, and the network has no two.
    """
    known = NETS.get(net_name(net))
    if known is None or not known.stems:
        if stem != "auto":
            two = ", ".join(name for name, other in NETS.items() if other.stems)
            raise NetError(f"net {net!r} has one stem only; {two} have an imagenet and a cifar one")
        return None
    return "imagenet" if known.model(size, stem) == known.large else "cifar"


def architecture(net: str, size: int, stem: str = "auto") -> tuple[str, Options]:
    """Return the timm model that a network is for an image size, and its keywords.

    Raises:
        NetError: no such network, or no such stem.
    """
    check_net(net)
    stem_of(net, size, stem)
    known = NETS.get(net_name(net))
    if known is not None:
        return known.model(size, stem), dict(known.options(size))
    return net, {} if net.startswith(HUB_PREFIXES) else _own_options(net, size)


def create_net(
    net: str,
    *,
    classes: int,
    size: int,
    pretrained: bool = False,
    finetune_from: str | None = None,
    stem: str = "auto",
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a network.

    Args:
        net: A name in `NETS` in any spelling, any timm model, `hf-hub:OWNER/NAME` or
            `local-dir:FOLDER`.
        classes: Number of classes.
        size: Image side in pixels.
        pretrained: Load timm's weights (a model of the hub or of a folder has its own).
        finetune_from: Weights to start from instead.
        stem: `imagenet` or `cifar` where the network has both; `auto` is `cifar` below 128 pixels.
        drop: Dropout.
        drop_path: Stochastic depth.

    Raises:
        NetError: no such network, one that does not take such images, weights of another one, or
            weights that cannot be fetched.
    """
    name, options = architecture(net, size, stem)
    hub = net.startswith(HUB_PREFIXES)
    dropped = {"drop_rate": drop, "drop_path_rate": drop_path}
    options |= {key: value for key, value in dropped.items() if value}
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=pretrained or (hub and finetune_from is None),
            num_classes=classes,
            **options,
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetError(
            f"net {net!r}: its weights could not be fetched, is there a network? ({reason})"
        ) from error
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise NetError(f"net {net!r} cannot be built for {size}x{size} images: {error}") from error
    if finetune_from:
        load_weights(model, Path(finetune_from))
    return model


def _own_options(net: str, size: int) -> Options:
    """Give `img_size` to a timm model that is built for one size, which is not this one."""
    cfg = timm.get_pretrained_cfg(timm.models.get_arch_name(net), allow_unregistered=True)
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != size
    return {"img_size": size} if fixed else {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a run (`model.safetensors`, a .ckpt) into a model.

    Tensors of another shape, a head for other classes, are left out; a file that shares no tensor
    with the model is refused.

    Raises:
        NetError: no such file, or weights of another network.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise NetError(f"finetune_from must be a file of weights, got {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        inner = cast("dict[str, Any]", loaded).get("state_dict", loaded)
        state = {key.removeprefix("net."): v for key, v in inner.items() if torch.is_tensor(v)}
    own = model.state_dict()
    fitting = {key: v for key, v in state.items() if key in own and own[key].shape == v.shape}
    missing = [key for key in own if key not in fitting]
    head = set(own) - set(fitting) - {key for key in own if key in state}
    if not fitting or head:
        example = sorted(head or missing)[0]
        raise NetError(
            f"{str(path)!r} has weights of another network: it has no {example!r}, "
            f"and fits {len(fitting)} of {len(own)} tensors"
        )
    model.load_state_dict(fitting, strict=False)
