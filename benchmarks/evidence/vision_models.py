"""CIFAR-sized networks out of timm's blocks: ResNet-18 of any width, and a small ViT."""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def resnet18(width: int = 64, stem_stride: int = 1) -> nn.Module:
    """ResNet-18 with the 3x3 stem of the CIFAR form; width 64 and stride 1 are the usual net."""
    widths = tuple(width * factor for factor in (1, 2, 4, 8))
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10, channels=widths)
    # timm's stem has 64 channels whatever the width of the stages.
    net.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    net.maxpool = nn.Identity()
    net.layer1[0] = BasicBlock(width, width)
    return net


def vit(width: int = 192, depth: int = 6, heads: int = 3, patch: int = 4) -> nn.Module:
    """A ViT on 32x32 images."""
    return VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=10
    )


MODELS = {"resnet18": resnet18, "vit": vit}


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """Return a model by its name in the configuration."""
    return MODELS[name](**options)
