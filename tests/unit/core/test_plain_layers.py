"""Layers that pad by a rule of their own."""

import pytest
import torch
from helpers.endings import images
from torch import nn
from torch.nn import functional as F

import pattern_bench as pb
from pattern_bench.core.canonical import canonical
from pattern_bench.errors import UserError


class Same(nn.Conv2d):
    """Pads as TensorFlow does, by the size of what it is given; or by a rule of its own."""

    rule = staticmethod(lambda n, k, s: max(0, (-(-n // s) - 1) * s + k - n))

    def forward(self, x):
        margins = [self.rule(n, k, s) for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)]
        (top, left), (height, width) = [m // 2 for m in margins], margins
        return self._conv_forward(F.pad(x, (left, width - left, top, height - top)), self.weight, self.bias)


class Odd(Same):
    rule = staticmethod(lambda n, k, s: n % 3)


def padded(kind, kernel):
    torch.manual_seed(0)
    return nn.Sequential(
        kind(3, 8, kernel, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("first", [12, 13])
def test_batches_of_other_sizes_through_same_padding_are_the_sum_of_separate_ones(kernel, first):
    model, batches = padded(Same, kernel), [images(4, 3, n, n + 1) for n in (first, 15, 14, 25 - first)]
    together = pb.collect_moments(model, batches)["0"]
    alone = [pb.collect_moments(model, [x])["0"] for x in batches]
    for key, found in together.tensors().items():
        torch.testing.assert_close(found, sum(one.tensors()[key] for one in alone), rtol=1e-4, atol=1e-3)
    network = canonical(model, batches[0][:1])
    for x in batches:
        torch.testing.assert_close(network(x), model(x).detach())


def test_another_rule_of_padding_holds_for_one_size():
    model = padded(Odd, 3)
    network = canonical(model, images(1))
    torch.testing.assert_close(network(images()), model(images()).detach())
    network = canonical(model, images(1, 3, 14, 14))
    with pytest.raises(
        UserError, match="written out for inputs of 14×14, and meets one of 15×15: give images of one size"
    ):
        network(images(2, 3, 15, 15))
