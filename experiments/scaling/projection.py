"""On paper: patterns and ρ of the whole ImageNet, for networks of any size, on many GPUs. Nothing here is measured.

A network's layers are looked at on the ``meta`` device, where tensors have shapes and no values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

from pattern_bench.core.gram import autocorrelation_applies, is_small_patch
from pattern_bench.core.layers import LAYER_TYPES, geometry_of, neurons, patch_size

IMAGENET, VALIDATION = 1_281_167, 50_000
WIDE, TIMES = "vgg16 conv layers, 4 × as wide", 4
GPUS = (1, 2, 4, 8, 16, 32, 64)
# Assumptions: operations per second that a forward pass sustains in float32 on one GPU, and the solves in float64;
# bytes per second that reach the first process from the others.
FORWARD_FLOPS, SOLVE_FLOPS, LINK = 50e12, 10e12, 25e9
NETWORKS = (
    "squeezenet1_1", "vgg16 conv layers", "resnet18", "resnet50", "vgg16", "wide_resnet101_2", "convnext_large",
    WIDE,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What one layer asks for; operations count a multiplication and an addition as two."""

    forward: float  # operations of an image
    patterns: float  # of an image, besides the forward pass
    everything: float  # the same
    solve: float  # float64 operations of ρ: S_a+-, criterion all
    pattern_bytes: int
    gram_bytes: int


def sizes(name: str) -> list[Size]:
    """Of every layer of one of torchvision's models, at 224×224."""
    with torch.device("meta"):
        if name == WIDE:
            wide = [width if width == "M" else TIMES * int(width) for width in cfgs["D"]]
            network: nn.Module = make_layers(wide)
        elif name == "vgg16 conv layers":
            network = models.vgg16(weights=None).features
        else:
            network = models.get_model(name, weights=None)
        found: list[Size] = []

        def look(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(size(layer, inputs[0], output))

        for module in network.modules():
            if isinstance(module, LAYER_TYPES):
                module.register_forward_hook(look)
        network.eval()(torch.empty(1, 3, 224, 224))
    return found


def size(layer: Any, x: Tensor, y: Tensor) -> Size:
    """Of a layer with an image's input and output.

    Patterns take three weight gradients, everything that ρ needs two and the Gram matrix: by autocorrelation (all
    offsets of half the plane; its border is left out here), or the product of the unfolded patches. Small patches are
    unfolded in float64, where u = wᵀx is computed once more, and both regimes' sums are taken for either.
    """
    geometry, n, d = geometry_of(layer), neurons(layer), patch_size(layer)
    positions = y.numel() // n
    forward = 2 * n * d * positions
    small = is_small_patch(d)
    if geometry.kernel and not small and autocorrelation_applies(geometry, x.shape[1], tuple(x.shape[2:])):
        rows, columns = geometry.kernel
        channels = x.shape[1]
        gram = 2 * channels * (channels // geometry.groups) * rows * (2 * columns - 1) * x[0, 0].numel()
    else:
        gram = 2 * geometry.groups * d * d * positions
    return Size(
        forward=forward,
        patterns=(4 if small else 3) * forward,
        everything=(4 if small else 2) * forward + gram,
        # One factorisation for each group; four solved columns and one product with the test split's Gram matrix.
        solve=geometry.groups * d**3 / 3 + n * 5 * 2 * d**2,
        pattern_bytes=8 * (3 * n * d + 5 * n + geometry.groups * d),
        gram_bytes=8 * geometry.groups * d * d,
    )


def total(found: list[Size], what: str) -> float:
    return float(sum(getattr(one, what) for one in found))


def ratios(found: list[Size]) -> tuple[float, float]:
    """Operations of patterns, and of everything, in those of the forward pass, which is part of both."""
    forward = total(found, "forward")
    return 1 + total(found, "patterns") / forward, 1 + total(found, "everything") / forward


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    forward: float  # operations of a plain forward pass
    solve: float  # float64 operations of ρ's solves
    link: float  # bytes that reach the first process from the others
    storing: float  # bytes of moments that are written to the cache and read back, both with their checksum


def passes(patterns: float, everything: float) -> float:
    """Forward passes of the whole protocol: patterns from half of the training images, v from the other half, ρ on the
    validation images."""
    fit = IMAGENET // 2
    return fit * patterns + (IMAGENET - fit + VALIDATION) * everything


def projected(name: str, patterns: float, everything: float, rates: Rates, workers: tuple[int, ...]) -> pd.DataFrame:
    """Seconds of the whole protocol by number of GPUs.

    Args:
        name: of the network.
        patterns: time of an image, in forward passes.
        everything: the same where Gram matrices are wanted.
        rates: of each GPU, and of the first process.
        workers: numbers of GPUs.

    Returns:
        Columns ``streaming``, shared among the GPUs, and the rest, which is not: ``reducing`` the sums of three splits
        in the first process, ``storing`` and ``solving`` there; ``seconds``, ``speedup`` over one GPU, and
        ``images_per_second`` that have to be loaded.
    """
    found = sizes(name)
    sums = 3 * total(found, "pattern_bytes") + 2 * total(found, "gram_bytes")
    table = pd.DataFrame({"network": name, "gpus": workers})
    table["streaming"] = passes(patterns, everything) * total(found, "forward") / rates.forward / table.gpus
    table["reducing"] = (sums / rates.link) * (table.gpus > 1)
    table["storing"] = sums / rates.storing
    table["solving"] = total(found, "solve") / rates.solve
    table["seconds"] = table.streaming + table.reducing + table.storing + table.solving
    table["speedup"] = table.seconds[0] / table.seconds
    table["images_per_second"] = (IMAGENET + VALIDATION) / table.streaming
    return table


def projection(measured: pd.DataFrame, storing: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Projected rows of all networks, and what they are made of.

    Args:
        measured: of ``cost.by_network``. A network that was measured has its own ratios; another has the ratio of its
            operations times the measured networks' mean of measured over counted.
        storing: measured, see :class:`Rates`.

    Returns:
        Rows of :func:`projected`; by network ``gflop`` of the forward pass, ratios, whether they were ``measured``,
        ``pattern_gib`` and ``gram_gib`` of the moments, ``solve_tflop``.
    """
    own = measured.pivot(index="network", columns="what", values="ratio")
    counts = measured.pivot(index="network", columns="what", values="operations")
    columns = ["patterns", "everything for rho"]
    slower = (own[columns] / counts[columns].div(counts["forward"], axis=0)).mean()
    rates = Rates(FORWARD_FLOPS, SOLVE_FLOPS, LINK, storing)
    rows, about = [], []
    for name in NETWORKS:
        found = sizes(name)
        if name in own.index:
            patterns, everything = (float(own[column][name]) for column in columns)
        else:
            patterns, everything = (a * b for a, b in zip(ratios(found), slower, strict=True))
        rows.append(projected(name, patterns, everything, rates, GPUS))
        about.append(
            {"network": name, "layers": len(found), "gflop": total(found, "forward") / 1e9, "patterns": patterns,
             "everything": everything, "measured": name in own.index,
             "pattern_gib": total(found, "pattern_bytes") / 2**30, "gram_gib": total(found, "gram_bytes") / 2**30,
             "solve_tflop": total(found, "solve") / 1e12}
        )  # fmt: skip
    return pd.concat(rows, ignore_index=True), pd.DataFrame(about)
