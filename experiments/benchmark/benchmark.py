"""Measures the suite's engine against a plain forward pass: ``python experiments/benchmark/benchmark.py --help``.

Everything runs in one process, interleaved, on the same batch: each repeat times every row once, and a row's ratio is
taken repeat by repeat against that repeat's forward pass, so that a machine whose speed drifts does not mislead.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision import models

from pattern_bench.core.collector import Collector
from pattern_bench.core.degradation import degraded, random_ranks
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.layers import geometry_of, patches
from pattern_bench.core.network import collecting, layers_in_order
from pattern_bench.methods.gradients import Gradient
from pattern_bench.methods.patterns import PatternAttribution
from pattern_bench.models.small import SmallVGG
from pattern_bench.models.source import load_weights, read_weights
from pattern_bench.streams import fast_layout


def networks(weights: str | None, batch: int, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """VGG-16's conv layers on 224×224 pixels (with a classifier of one pooled output for attribution and
    degradation), and the small VGG on 8×8."""
    vgg = models.vgg16(weights=None).features
    if weights is not None:
        state = {key.removeprefix("features."): t for key, t in read_weights(weights).items() if "features." in key}
        load_weights(vgg, state, f"--weights {weights}", "vgg16.features")
    vgg = nn.Sequential(vgg, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    digits = torch.rand(64 * batch, 1, 8, 8)
    small = SmallVGG(name="small_vgg", weights=None, training=None, width=16).module(digits[0], 10)
    torch.manual_seed(0)
    named = {"vgg16 conv layers": (vgg, torch.randn(batch, 3, 224, 224)), "small_vgg": (small, digits)}
    return {k: (m.eval().requires_grad_(False).to(device), x.to(device)) for k, (m, x) in named.items()}


def unfolding(model: nn.Module, layers: list[str], x: Tensor, gram: bool) -> None:
    """The same sums through unfolded patches, as one would write it first."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        source = inputs[0]
        p = patches(source, geometry_of(layer))[0]  # type: ignore[arg-type]
        t = y.movedim(1, -1).reshape(len(p), -1)
        gate = (t > 0).to(t.dtype)
        for m in (gate, t * gate, t - t * gate):
            m.T @ p
        if gram:
            p.T @ p

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in layers]
    model(x)
    for handle in handles:
        handle.remove()


def rows(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; every one works on the whole batch."""
    layers = layers_in_order(model, x[:1])
    fast = fast_layout(x)
    collectors = {
        gram: {name: Collector(model.get_submodule(name), gram) for name in layers}  # type: ignore[arg-type]
        for gram in (False, True)
    }
    filters = {
        name: Pattern(w := model.get_submodule(name).weight, w, torch.zeros(len(w), dtype=torch.bool))  # type: ignore
        for name in layers
    }
    ranks = random_ranks(len(x), x.shape[2] // 2, x.shape[3] // 2, torch.Generator().manual_seed(0)).to(x.device)
    steps = degraded(x, ranks, 2, ranks[0].numel())
    gradient, attribution = Gradient(model), PatternAttribution(model, filters)

    def collect(gram: bool) -> None:
        with collecting(model, collectors[gram]):
            model(fast)

    return {
        "forward": lambda: model(x),
        "forward, channels last": lambda: model(fast),
        "patterns of all estimators": lambda: collect(False),
        "everything that exact rho needs": lambda: collect(True),
        "patterns, unfolding": lambda: unfolding(model, layers, x, False),
        "everything for rho, unfolding": lambda: unfolding(model, layers, x, True),
        "forward and backward": lambda: gradient.attribute(x),
        "PatternAttribution": lambda: attribution.attribute(x),
        "a degraded image": lambda: model(next(steps)),
    }


def measure(model: nn.Module, x: Tensor, repeats: int) -> pd.DataFrame:
    """Median seconds of each row, and its ratio to the forward pass: median, smallest, largest."""
    timed = rows(model, x)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, function in timed.items():
                start = time.perf_counter()
                function()
                if x.is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    table = pd.DataFrame(seconds).iloc[1:]  # the first repeat warms up
    ratios = table.div(table["forward"], axis=0)
    columns = {"seconds": table.median(), "ratio": ratios.median(), "least": ratios.min(), "most": ratios.max()}
    return pd.DataFrame(columns).rename_axis("what").reset_index()


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="safetensors with VGG-16's features.*; random otherwise")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    tables = []
    for name, (model, x) in networks(options.weights, options.batch, options.device).items():
        tables.append(measure(model, x, options.repeats).assign(network=name, batch=len(x)))
        print(
            f"{name}, batch {len(x)}\n{tables[-1].drop(columns=['network', 'batch']).round(3).to_string(index=False)}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{machine(options.device)}; peak memory {peak:.0f} MiB")
    table = pd.concat(tables).assign(machine=machine(options.device), peak_memory_mib=round(peak))
    table.to_csv(options.output / f"{options.device}.csv", index=False)


if __name__ == "__main__":
    main()
