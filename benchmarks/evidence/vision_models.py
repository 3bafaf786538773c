"""CIFAR-sized networks out of timm's blocks: ResNet-18 of any width, and a small ViT."""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


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


class _Block(nn.Module):
    """Two 3x3 convolutions; where the stride is 2, the shortcut has no weights (He et al.'s A)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stride = 1 if width == out else 2
        self.conv1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.pad = (out - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(kept, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 (He et al. 2015, section 4.2) up to its 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16), (16, 32), (32, 64)]
        for stage, (width, out) in enumerate(widths, 1):
            blocks = [_Block(width, out), _Block(out, out), _Block(out, out)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


def head(width: int = 512, features: int = 64) -> nn.Module:
    """A two-layer head on fixed features, wide enough to learn wrong labels by heart."""
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 10))


MODELS = {"head": head, "resnet18": resnet18, "vit": vit}


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """Return a model by its name in the configuration."""
    return MODELS[name](**options)
