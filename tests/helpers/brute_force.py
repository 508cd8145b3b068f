"""Layers of every geometry, and references for them by brute force that share no arithmetic with the package."""

from __future__ import annotations

import itertools

import numpy as np
from torch import nn

from pattern_bench.core import estimators
from pattern_bench.core.collector import Collector

FITTED = {e.name: e for e in (estimators.Random, estimators.Filter, estimators.Linear, estimators.TwoRegimes)}

GEOMETRIES = {
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), (3, 3, 6, 5)),
    "strided": lambda: (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 3, 7, 8)),
    "dilated": lambda: (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2, bias=False), (2, 2, 7, 6)),
    "grouped": lambda: (nn.Conv2d(4, 6, 2, groups=2), (3, 4, 5, 5)),
    "depthwise": lambda: (nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 3, 5, 5)),
    "same": lambda: (nn.Conv2d(2, 3, (2, 3), padding="same"), (3, 2, 5, 6)),
    "reflect": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 5, 6)),
    "circular": lambda: (nn.Conv2d(2, 3, 3, padding=(0, 2), padding_mode="circular"), (3, 2, 5, 6)),
    "conv1d": lambda: (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 9)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2, padding=(0, 1, 0)), (2, 2, 4, 3, 4)),
    "linear": lambda: (nn.Linear(5, 4), (30, 5)),
    "linear_on_sequences": lambda: (nn.Linear(5, 4), (6, 7, 5)),
}


def brute_patches(layer, x):
    """(G, samples, D) float64 patches, one output position after the other."""
    x = x.double().numpy()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    kernel, stride, dilation, groups = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    if layer.padding == "same":
        width = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        width = [(p, p) for p in ((0,) * len(kernel) if layer.padding == "valid" else layer.padding)]
    mode = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}[layer.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *width], mode=mode)
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    per_group = x.shape[1] // groups
    found = [[] for _ in range(groups)]
    for image in x:
        for position in itertools.product(*map(range, out)):
            window = tuple(
                slice(p * s, p * s + d * (k - 1) + 1, d)
                for p, s, d, k in zip(position, stride, dilation, kernel, strict=True)
            )
            for g in range(groups):
                found[g].append(image[(slice(g * per_group, (g + 1) * per_group), *window)].ravel())
    return np.array(found)


def brute_neuron(layer, x, neuron):
    """One neuron's patches X (samples, D), u (samples,) and gate (samples,), float64."""
    patches = brute_patches(layer, x)
    per_group = layer.weight.shape[0] // len(patches)
    patch = patches[neuron // per_group]
    u = patch @ layer.weight[neuron].detach().double().numpy().ravel()
    bias = 0.0 if layer.bias is None else float(layer.bias[neuron])
    return patch, u, u + bias > 0


def sums(layer, x, gram=True):
    collector = Collector(layer, gram=gram)
    collector.add(x, layer(x))
    return collector.moments()


def residual(layer, x, pattern, neuron, criterion):
    """d and y of one neuron, sample by sample."""
    patch, u, gate = brute_neuron(layer, x, neuron)
    positive, negative = pattern.positive[neuron].numpy(), pattern.negative[neuron].numpy()
    signal = np.where(gate[:, None], positive, negative) * u[:, None]
    return patch - signal, target_of(u, layer, neuron, criterion)


def target_of(u, layer, neuron, criterion):
    y = u if layer.bias is None else u + float(layer.bias[neuron])
    return y if criterion == "all" else np.maximum(y, 0)


def brute_rho(layer, probe_x, test_x, pattern, neuron, ridge, criterion="all"):
    """Least squares on the probe samples (ridge as extra rows), correlation on the test samples."""
    d, y = residual(layer, probe_x, pattern, neuron, criterion)
    d, y = d - d.mean(0), y - y.mean()
    rows = np.sqrt(ridge * len(d)) * np.eye(d.shape[1])
    v = np.linalg.lstsq(np.vstack([d, rows]), np.concatenate([y, np.zeros(len(rows))]), rcond=None)[0]
    d, y = residual(layer, test_x, pattern, neuron, criterion)
    return 1 - np.corrcoef(d @ v, y)[0, 1]


def collected(layer, *batches, gram=True, memory=2**30):
    collector = Collector(layer, gram, memory)
    for x in batches:
        collector.add(x, layer(x))
    return collector.moments()
