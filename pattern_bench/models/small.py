"""Small networks that are trained on the spot."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.errors import UserError
from pattern_bench.models.source import ModelSource


class SmallVGG(ModelSource):
    """VGG in small: conv-ReLU twice, max-pool, the same again with twice the channels, and two dense layers.

    Args:
        width: channels of the first block; the dense layer has four times as many neurons.
    """

    def __init__(self, *, width: int, **common: Any) -> None:
        super().__init__(**common)
        self.width = width

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        if sample.ndim != 3 or min(sample.shape[1:]) < 4:
            raise UserError(
                f"model={self.name} takes images of at least 4×4 pixels, and the data have shape "
                f"{tuple(sample.shape)}: choose other data, or model=linear"
            )
        if classes is None:
            raise UserError(
                f"model={self.name} is trained on class labels, and the data have none: give labelled data "
                "(one subfolder per class), or a model with weights"
            )
        channels, w = sample.shape[0], self.width

        def block(before: int, after: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(after, after, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]

        features = nn.Sequential(*block(channels, w), *block(w, 2 * w))
        flat = 2 * w * (sample.shape[1] // 4) * (sample.shape[2] // 4)
        classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, 4 * w), nn.ReLU(inplace=True), nn.Linear(4 * w, classes)
        )
        return nn.Sequential(OrderedDict(features=features, classifier=classifier))


class LinearModel(ModelSource):
    """One dense layer on the flattened input: the linear model of the paper's section 2."""

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        layer = nn.Linear(sample.numel(), classes or 1)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=layer))
