"""Small networks that are trained on the spot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.configuration.rules import Rule, boolean, check_arguments, is_number, whole_number, whole_numbers
from pattern_bench.errors import UserError
from pattern_bench.models.base import ModelSource

SIZES = "give whole numbers of at least 1"
VGG_RULES = (
    whole_number("model.width", 1, remedy=SIZES),
    whole_numbers("model.blocks", 1, SIZES),
    whole_numbers("model.dense", 1, SIZES),
    boolean("model.batch_norm"),
    Rule("model.dropout", lambda share: is_number(share) and 0 <= share < 1, "give a probability below 1, 0 for none"),
)


class VGG(ModelSource):
    """A VGG of any size: blocks of 3×3 convolutions with ReLU, each closed by a 2×2 max-pool, then dense layers.

    Args:
        width: channels of the first block; every block has twice the channels of the one before.
        blocks: convolutions of each block.
        dense: neurons of each hidden dense layer; the last layer has one per class.
        batch_norm: whether each convolution is followed by batch norm.
        dropout: probability that a neuron of a hidden dense layer is dropped in training.

    Raises:
        UserError: where one of these is not possible.
    """

    def __init__(
        self,
        *,
        width: int,
        blocks: Sequence[int],
        dense: Sequence[int],
        batch_norm: bool,
        dropout: float,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_arguments(VGG_RULES, width=width, blocks=blocks, dense=dense, batch_norm=batch_norm, dropout=dropout)
        self.width, self.blocks, self.dense, self.batch_norm = width, list(blocks), list(dense), batch_norm
        self.dropout = dropout

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        least = 2 ** len(self.blocks)
        if sample.ndim != 3 or min(sample.shape[1:]) < least:
            raise UserError(
                f"model={self.name} takes images of at least {least}×{least} pixels, and the data have shape "
                f"{tuple(sample.shape)}: choose other data, or model=linear"
            )
        if classes is None:
            raise UserError(
                f"model={self.name} is trained on class labels, and the data have none: give labelled data "
                "(one subfolder per class), or a model with weights"
            )
        features: list[nn.Module] = []
        channels, width = sample.shape[0], self.width
        for convolutions in self.blocks:
            for _ in range(convolutions):
                features.append(nn.Conv2d(channels, width, 3, padding=1))
                features += [nn.BatchNorm2d(width)] if self.batch_norm else []
                features.append(nn.ReLU(inplace=True))
                channels = width
            features.append(nn.MaxPool2d(2))
            width *= 2
        classifier: list[nn.Module] = [nn.Flatten()]
        inputs = channels * (sample.shape[1] // least) * (sample.shape[2] // least)
        for neurons in self.dense:
            classifier += [nn.Linear(inputs, neurons), nn.ReLU(inplace=True)]
            classifier += [nn.Dropout(self.dropout)] if self.dropout else []
            inputs = neurons
        classifier.append(nn.Linear(inputs, classes))
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["features"], parts["classifier"] = nn.Sequential(*features), nn.Sequential(*classifier)
        return nn.Sequential(parts)


class LinearModel(ModelSource):
    """One dense layer on the flattened input: the linear model of the paper's section 2."""

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        layer = nn.Linear(sample.numel(), classes or 1)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=layer))
