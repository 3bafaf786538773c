"""timm's ResNets, VGG and mixers for 32x32 images, registered with timm as `NAME_cifar`.

Importing this module registers them, so that `--model resnet18_cifar` works in timm's own train.py
as it does in the built-in trainer. timm calls an entry point with whatever keywords `create_model`
was given, which is why these take `**kwargs`.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import register_model
from torch import nn

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def _describe(model: nn.Module, pool: int | None = None) -> None:
    """Tell timm's data pipeline what the model eats."""
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    cfg.update(
        input_size=(3, 32, 32),
        test_input_size=None,
        pool_size=None if pool is None else (pool, pool),
        crop_pct=1.0,
        test_crop_pct=None,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]


def cifar_resnet(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return timm's ResNet `name` with a CIFAR stem: a 3x3 convolution of stride 1, no pooling.

    With `pretrained` every layer but the stem keeps its weights.

    Source: He et al., 2015, section 4.2, as used in common CIFAR ResNet-18 recipes.
    """
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    old = model.conv1
    assert isinstance(old, nn.Conv2d)
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    _describe(model, pool=4)
    return model


def cifar_vgg(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return timm's VGG `name` with the head of CIFAR recipes: pooled features, one linear map.

    The two 4096-wide layers of the ImageNet head see a single 1x1 feature map at 32x32; they would
    be 120 of the 140 million parameters.
    """
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    features = int(model.num_features)  # type: ignore[arg-type]
    head: Any = model.head
    model.pre_logits = nn.Identity()
    model.head_hidden_size = features  # type: ignore[assignment]
    if isinstance(head.fc, nn.Linear):
        head.fc = nn.Linear(features, head.fc.out_features)
        nn.init.normal_(head.fc.weight, 0.0, 0.01)
        nn.init.zeros_(head.fc.bias)
    _describe(model, pool=1)
    return model


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32x32 images, 11.2 M parameters."""
    return cifar_resnet("resnet18", pretrained=pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for 32x32 images, 21.3 M parameters."""
    return cifar_resnet("resnet34", pretrained=pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for 32x32 images, 23.5 M parameters."""
    return cifar_resnet("resnet50", pretrained=pretrained, **kwargs)


@register_model
def resnet101_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 for 32x32 images, 42.5 M parameters."""
    return cifar_resnet("resnet101", pretrained=pretrained, **kwargs)


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm for 32x32 images, 20.0 M parameters."""
    return cifar_vgg("vgg19_bn", pretrained=pretrained, **kwargs)


def _mixer(model: nn.Module, name: str, pretrained: bool) -> nn.Module:
    """Finish a model that has no ImageNet counterpart."""
    if pretrained:
        raise RuntimeError(f"there are no pretrained weights of {name}")
    _describe(model)
    return model


@register_model
def convmixer_256_16_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvMixer-256/16 for 32x32 images: kernels of 9, patches of 1; 1.4 M parameters."""
    from timm.models.convmixer import ConvMixer

    model = ConvMixer(dim=256, depth=16, kernel_size=9, patch_size=1, **_plain(kwargs))
    return _mixer(model, "convmixer_256_16_cifar", pretrained)


@register_model
def mixer_s4_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLP-Mixer-S for small images: patches of 4, 8 blocks of 512; 17 M parameters at 32x32."""
    from timm.models.mlp_mixer import MlpMixer

    options = {"img_size": 32, **_plain(kwargs)}
    model = MlpMixer(patch_size=4, num_blocks=8, embed_dim=512, **options)
    return _mixer(model, "mixer_s4_cifar", pretrained)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is for timm's builder and not for the model class."""
    builder = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only")
    return {key: value for key, value in options.items() if key not in builder}
