"""The networks that are timed, and their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from pattern_bench.api import canonical_form
from pattern_bench.data.base import photograph_transform
from pattern_bench.data.folder import FolderPool
from pattern_bench.models.small import VGG
from pattern_bench.models.vision import TorchvisionModel

VGG16, SMALL_VGG, SQUEEZENET, MOBILENET = "vgg16 conv layers", "small_vgg", "squeezenet1_1", "mobilenet_v2"
SIDE = 224


def networks(weights: str | None, images: str | None, batch: int, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """VGG-16's conv layers on 224×224 pixels (with a classifier of one pooled output for attribution and degradation),
    the small VGG on 8×8, and on 224×224 two networks of small patches, whose sums are taken in float64: SqueezeNet 1.1
    and, with depthwise layers, MobileNetV2, of random weights.

    Args:
        weights: safetensors with VGG-16's ``features.*``; None for random ones.
        images: folder of photographs; None for Gaussian noise.
        batch: images; 64 times as many for the small VGG.
        device: that networks and images are put on.
    """
    vgg = vgg16(weights)
    digits = torch.rand(64 * batch, 1, 8, 8)
    small = small_vgg(digits[0])
    torch.manual_seed(0)
    photographs = torch.randn(batch, 3, SIDE, SIDE)
    if images is not None:
        pool, transform = FolderPool(images, "--images"), photograph_transform(SIDE)
        photographs = torch.stack([transform(pool.image(i)) for i in range(batch)])
    named = {VGG16: (vgg, photographs), SMALL_VGG: (small, digits)}
    for name in (SQUEEZENET, MOBILENET):
        named[name] = canonical_form(models.get_model(name, weights=None).eval(), photographs[:1]), photographs
    return {k: (m.eval().requires_grad_(False).to(device), x.to(device)) for k, (m, x) in named.items()}


def vgg16(weights: str | None) -> nn.Module:
    """The conv layers of VGG-16, and one pooled output for each of their channels."""
    if weights is not None and not Path(weights).is_file():
        raise SystemExit(f"--weights {weights}: there is no such file")
    source = TorchvisionModel(name="vgg16", architecture="vgg16", weights=weights, part="features", training=None)
    layers: Any = source.build(torch.zeros(3, SIDE, SIDE), None)
    return nn.Sequential(layers.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_vgg(image: Tensor) -> nn.Module:
    """The network that the suite's main job trains on the digits, untrained."""
    source = VGG(
        name=SMALL_VGG, weights=None, training=None, width=16, blocks=[2, 2], dense=[64], batch_norm=False, dropout=0.0
    )
    return source.module(image, 10)
