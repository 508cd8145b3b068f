"""Networks that put out something else than logits."""

from collections import namedtuple

import torch
from torch import nn


def plain(outputs=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs)
    ).eval()  # fmt: skip


def images(count=6, *shape):
    return torch.randn(count, *(shape or (3, 12, 12)), generator=torch.Generator().manual_seed(1))


class Ending(nn.Module):
    """``end`` of the plain network's outputs; attention-like softmaxes come before it."""

    def __init__(self, end, outputs=5):
        super().__init__()
        self.output, self.end = plain(outputs), end  # a name that the wrapper must not take for itself

    def forward(self, x):
        gate = x.mean((2, 3)).softmax(1).sum(1).sigmoid()
        return self.end(self.output(x) * (gate / gate)[:, None])


Named = namedtuple("Named", "logits aux_logits")
