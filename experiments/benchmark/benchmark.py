"""Measures the suite's engine against a plain forward pass: ``python experiments/benchmark/benchmark.py --help``.

Everything runs in one process, interleaved, on the same batch: each repeat times every row once, and a row's ratio is
taken repeat by repeat against that repeat's forward pass, so that a machine whose speed drifts does not mislead.

The floor of a row is the larger of two times: its operations (torch's own count) over the rate of large matrix
products (or of a large convolution, where that is faster), and the bytes that its operations read and write over the
rate of a large copy, both measured here.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision import models

from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Filter, Linear, Pattern, Random, TwoRegimes
from pattern_bench.core.layers import Scratch, geometry_of, patches
from pattern_bench.core.moments import Moments
from pattern_bench.core.network import collecting, layers_in_order
from pattern_bench.core.probe_closed_form import CLOSED_FORM, Probe, Target, rho
from pattern_bench.core.rounding import float32_products
from pattern_bench.data.base import photograph_transform
from pattern_bench.data.folder import FolderPool
from pattern_bench.engine.streams import fast_layout
from pattern_bench.methods.gradients import Gradient
from pattern_bench.methods.patterns import PatternAttribution
from pattern_bench.metrics.degradation import degraded, grid_of, random_patch_order
from pattern_bench.models.base import load_weights, read_weights
from pattern_bench.models.small import VGG
from pattern_bench.results.schema import write_csv

FORWARD, POSITIONS = "forward", 0.1


def networks(weights: str | None, images: str | None, batch: int, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """VGG-16's conv layers on 224×224 pixels (with a classifier of one pooled output for attribution and degradation),
    the small VGG on 8×8, and on 224×224 two networks of small patches, whose sums are taken in float64: SqueezeNet 1.1
    and, with depthwise layers, MobileNetV2, of random weights."""
    vgg = models.vgg16(weights=None).features
    if weights is not None:
        state = {key.removeprefix("features."): t for key, t in read_weights(weights).items() if "features." in key}
        load_weights(vgg, state, f"--weights {weights}", "vgg16.features")
    vgg = nn.Sequential(vgg, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    digits = torch.rand(64 * batch, 1, 8, 8)
    small = VGG(
        name="small_vgg",
        weights=None,
        training=None,
        width=16,
        blocks=[2, 2],
        dense=[64],
        batch_norm=False,
        dropout=0.0,
    ).module(digits[0], 10)  # fmt: skip
    torch.manual_seed(0)
    photographs = torch.randn(batch, 3, 224, 224)
    if images is not None:
        pool, transform = FolderPool(images, "--images"), photograph_transform(224)
        photographs = torch.stack([transform(pool.image(i)) for i in range(batch)])
    named = {"vgg16 conv layers": (vgg, photographs), "small_vgg": (small, digits)}
    for make in (models.squeezenet1_1, models.mobilenet_v2):
        named[make.__name__] = canonical(make(weights=None).eval(), photographs[:1]), photographs
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


def collected(model: nn.Module, x: Tensor, layers: list[str], **settings: Any) -> dict[str, Moments]:
    """Exact or sampled moments of a batch."""
    collectors = {name: Collector(model.get_submodule(name), **settings) for name in layers}  # type: ignore[arg-type]
    with torch.no_grad(), collecting(model, collectors):
        model(fast_layout(x))
    return {name: collector.moments() for name, collector in collectors.items()}


def rows(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; every one works on the whole batch."""
    layers = layers_in_order(model, x[:1])
    fast = fast_layout(x)

    def collecting_row(gram: bool, **settings: Any) -> Callable[[], object]:
        settings["scratch"] = Scratch()
        collectors = {name: Collector(model.get_submodule(name), gram, **settings) for name in layers}  # type: ignore

        def run() -> None:
            with collecting(model, collectors):
                model(fast)

        return run

    filters = {}
    for name in layers:
        weight: Any = model.get_submodule(name).weight
        # S_w: with patterns of other lengths relevance shrinks to numbers that processors are slow with.
        pattern = weight / weight.flatten(1).square().sum(1).view(-1, *[1] * (weight.ndim - 1))
        filters[name] = Pattern(pattern, pattern, torch.zeros(len(weight), dtype=torch.bool))
    ranks = random_patch_order(len(x), grid_of(x.shape[2:], 2), torch.Generator().manual_seed(0)).to(x.device)
    steps = degraded(x, ranks, 2, ranks[0].numel())
    gradient, attribution = Gradient(model), PatternAttribution(model, filters)
    unfolded: dict[str, Callable[[], object]] = {}
    if all(getattr(model.get_submodule(name), "groups", 1) == 1 for name in layers):  # as `unfolding` takes them
        unfolded = {
            "patterns, unfolding": lambda: unfolding(model, layers, x, False),
            "everything for rho, unfolding": lambda: unfolding(model, layers, x, True),
        }
    return {
        FORWARD: lambda: model(x),
        "forward, channels last": lambda: model(fast),
        "patterns of all estimators": collecting_row(False),
        "everything that exact rho needs": collecting_row(True),
        f"patterns, {POSITIONS:.0%} of positions": collecting_row(False, positions=POSITIONS),
        f"everything for rho, {POSITIONS:.0%} of positions": collecting_row(True, positions=POSITIONS),
        **unfolded,
        "forward and backward": lambda: gradient.attribute(x),
        "PatternAttribution": lambda: attribution.attribute(x),
        "a degraded image": lambda: model(next(steps)),
    }


class _Work(TorchDispatchMode):
    """Counts operations, and the bytes that are read and written; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        if not func.is_view:
            tensors = [t for t in (*args, out, *(out if isinstance(out, tuple) else ())) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def counted(function: Callable[[], object]) -> tuple[int, int]:
    """Operations and bytes of a call."""
    with _Work() as work:
        function()
    return work.operations, work.bytes


def peak_memory(function: Callable[[], object], cuda: bool) -> float:
    """MiB that the process (on a GPU: the allocator) holds at most during a call; NaN where that cannot be asked."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
        function()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("VmHWM"))


def best(function: Callable[[], object], cuda: bool, repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rates(device: str) -> tuple[float, float]:
    """Operations per second of large float32 products, and bytes per second of a large copy (read and written): the
    best that was seen of each."""
    cuda, matrix = device == "cuda", 0.0
    for side in (2048, 4096):
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        matrix = max(matrix, 2 * side**3 / best(partial(torch.matmul, a, b), cuda))
    # On some processors torch's convolutions come from a faster library than its matrix products.
    layer, x = nn.Conv2d(512, 512, 3, padding=1).to(device), fast_layout(torch.randn(4, 512, 28, 28, device=device))
    with torch.no_grad():
        matrix = max(matrix, 2 * 4 * 28**2 * 9 * 512**2 / best(lambda: layer(x), cuda))
    source, target = (torch.zeros(2**26, device=device) for _ in range(2))
    return matrix, 2 * 4 * 2**26 / best(lambda: target.copy_(source), cuda)


def measure(model: nn.Module, x: Tensor, repeats: int, matrix: float, copy: float) -> pd.DataFrame:
    """Of each row: median seconds; ratio to the forward pass (median, least, most); floor, distance, and limit."""
    timed = rows(model, x)
    with torch.no_grad():
        counts = {name: counted(function) for name, function in timed.items()}
        memory = {name: peak_memory(function, x.is_cuda) for name, function in timed.items()}
        seconds = {name: [best(function, x.is_cuda, 1)] for name, function in timed.items()}
        for _ in range(repeats):
            for name, function in timed.items():
                seconds[name].append(best(function, x.is_cuda, 1))
    table = pd.DataFrame(seconds).iloc[1:]  # the first repeat warms up
    ratios = table.div(table[FORWARD], axis=0)
    columns = {"seconds": table.median(), "ratio": ratios.median(), "least": ratios.min(), "most": ratios.max()}
    found = pd.DataFrame(columns)
    work = pd.DataFrame(counts, index=["operations", "bytes"]).T
    by_operations, by_bytes = work.operations / matrix, work.bytes / copy
    found["floor_seconds"] = pd.concat([by_operations, by_bytes], axis=1).max(axis=1)
    found["of_floor"] = found.seconds / found.floor_seconds
    found["floor_is"] = (by_operations >= by_bytes).map({True: "operations", False: "bytes"})
    found["gflop"], found["gbyte"] = work.operations / 1e9, work.bytes / 1e9
    found["peak_memory_mib"] = pd.Series(memory)
    return found.rename_axis("what").reset_index()


def solving(device: str) -> pd.DataFrame:
    """Seconds for rho of all 512 neurons of a layer with D = 4,608, every estimator that has one, both criteria."""
    torch.manual_seed(0)
    layer = nn.Conv2d(512, 512, 3, padding=1).requires_grad_(False).to(device)
    collector = Collector(layer, gram=True)
    for _ in range(4):
        x = torch.randn(8, 512, 14, 14, device=device).relu()
        collector.add(x, layer(x))
    moments, weight = collector.moments(), layer.weight.flatten(1).double()
    generator = torch.Generator().manual_seed(0)
    estimators = (Random(), Filter(), Linear(), TwoRegimes())

    def solve() -> None:
        probe = Probe(moments, 1e-4)
        for estimator in estimators:
            pattern = estimator.fit(weight, moments, generator)
            for criterion in CLOSED_FORM:
                target = Target(criterion, layer.bias.double())  # type: ignore[union-attr]
                rho(probe.direction(pattern, target), moments, pattern, target)

    cuda = device == "cuda"
    a, b = (torch.randn(3000, 3000, dtype=torch.float64, device=device) for _ in range(2))
    rate = 2 * 3000**3 / best(lambda: a @ b, cuda)
    seconds = best(solve, cuda, 2)
    # One factorisation; per neuron 2 columns for one regime and 4 for two, one more for `rectified`.
    floor = (4608**3 / 3 + 512 * (3 * (2 + 3) + 4 + 5) * 2 * 4608**2) / rate
    what = "rho of 512 neurons, D = 4,608, all estimators, two criteria"
    return pd.DataFrame([{"what": what, "seconds": seconds, "floor_seconds": floor, "of_floor": seconds / floor,
                          "floor_is": "float64 operations"}])  # fmt: skip


def sampling_error(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """How far patterns from sampled positions are from exact ones: |a - a_exact| / |a_exact|, over live neurons."""
    layers = layers_in_order(model, x[:1])
    exact = collected(model, x, layers, gram=False)
    sampled = collected(model, x, layers, gram=False, positions=POSITIONS)
    found = []
    for name in layers:
        weight = model.get_submodule(name).weight.flatten(1).double()  # type: ignore[operator]
        row: dict[str, Any] = {"layer": name, "positions": int(exact[name].n) // len(x)}
        for estimator in (Linear(), TwoRegimes()):
            a, b = (estimator.fit(weight, m[name], torch.Generator()) for m in (exact, sampled))
            live = ~(a.dead | b.dead)
            error = (b.positive - a.positive)[live].norm(dim=1) / a.positive[live].norm(dim=1)
            row[f"{estimator.name}_median"] = float(error.median())
            row[f"{estimator.name}_90_percent_below"] = float(error.quantile(0.9))
        found.append(row)
    return pd.DataFrame(found)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"


@float32_products()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="safetensors with VGG-16's features.*; random otherwise")
    parser.add_argument("--images", help="folder of photographs for VGG-16; Gaussian noise otherwise")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="images; 64 times as many for small_vgg")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    matrix, copy = rates(options.device)
    tables = []
    built: dict[tuple[str, int], tuple[nn.Module, Tensor]] = {}
    for batch in options.batch:
        built |= {
            (n, batch): pair for n, pair in networks(options.weights, options.images, batch, options.device).items()
        }
    for (name, _), (model, x) in built.items():
        tables.append(measure(model, x, options.repeats, matrix, copy).assign(network=name, batch=len(x)))
        shown = tables[-1].drop(columns=["network", "batch"])
        print(f"{name}, batch {len(x)}\n{shown.round(3).to_string(index=False)}\n", flush=True)
    tables.append(solving(options.device))
    print(tables[-1].round(2).to_string(index=False))
    errors = sampling_error(*built["vgg16 conv layers", options.batch[-1]])
    print(f"\n{POSITIONS:.0%} of positions, error of a\n{errors.round(3).to_string(index=False)}")
    write_csv(options.output / "positions.csv", errors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    said = f"{machine(options.device)}; {matrix / 1e9:.0f} GFLOP/s float32, {copy / 1e9:.1f} GB/s"
    print(f"\n{said}; peak memory {peak:.0f} MiB")
    write_csv(options.output / f"{options.device}.csv", pd.concat(tables).assign(machine=said))


if __name__ == "__main__":
    main()
