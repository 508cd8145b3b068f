"""A fold of batch norm is refused where it computes something else, and not for the rounding of products."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pattern_bench.core import canonical as module
from pattern_bench.core.batch_norm import foldable
from pattern_bench.core.canonical import canonical
from pattern_bench.errors import UserError


class Rounding(TorchDispatchMode):
    """Convolutions as GPUs compute them in TF32: operands of float32 keep ten bits of mantissa."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::convolution", "aten::_convolution", "aten::convolution_backward"):
            args = [rounded(a) if i < 2 + ("backward" in func._schema.name) else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def rounded(t):
    if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def deep(dtype=torch.float32, blocks=16):
    torch.manual_seed(0)
    layers, channels = [], 3
    for _ in range(blocks):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        channels = 8
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 3)
            norm.weight.data.uniform_(0.3, 1.7)
            norm.bias.data.normal_(0, 0.3)
    return net.to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fold_is_not_refused_for_the_rounding_of_products(dtype):
    net, x = deep(dtype)
    with Rounding():
        folded = canonical(net, x)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("place", [0, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fold_whose_weights_are_off_by_one_percent_is_refused(monkeypatch, place, one, dtype, tf32):
    fuse, count = module.fuse_conv_bn_eval, iter(range(100))

    def wrong(layer, norm):
        fused = fuse(layer, norm)
        if next(count) == place:
            fused.weight.data.view(-1)[5 if one else slice(None)] *= 1.01
        return fused

    monkeypatch.setattr(module, "fuse_conv_bn_eval", wrong)
    net, x = deep(dtype)
    with pytest.raises(UserError, match="computes other outputs"), Rounding() if tf32 else contextlib.nullcontext():
        canonical(net, x)


def test_randomness_is_no_rounding():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 0.01 * torch.randn(5, dtype=x.dtype)

    net, x = deep()
    with pytest.raises(UserError, match="take randomness out"):
        canonical(Noisy(*net).eval(), x)


def test_a_batch_norm_of_the_batch_cannot_be_folded():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    assert foldable(model, torch.randn(2, 1, 3, 3), "mine") == []
