"""What patterns and ρ cost as images, layers, width and sampled positions grow: always beside a plain forward pass of
the same images, measured in turn with it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pattern_bench as pb
from experiments.passes import moment_pass
from pattern_bench.api import LayerMoments, canonical_form
from pattern_bench.engine.streams import fast_layout
from pattern_bench.storage.cache import Cache

FORWARD, PATTERNS, EVERYTHING, RHO = "forward", "patterns", "everything for rho", "rho"
LONG = 3.0
"""Seconds."""
SIDE = 28
"""Of the images in the experiment of widths."""


def measured(timed: Mapping[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Each thing once for warming up, then ``repeats`` times in turn; what takes longer than ``LONG`` is not repeated.

    Returns:
        By ``what``: median ``seconds``; ``ratio`` to the forward pass of the same repeat, median, ``least`` and
        ``most``; ``mib``, what the process took at most in the first call beyond what it held before, NaN where the
        system does not tell.
    """
    first = {what: (_seconds(thing), _status("VmHWM") - held) for what, thing, held in _fresh(timed)}
    found = []
    for _ in range(repeats):
        found.append({what: first[what][0] if first[what][0] > LONG else _seconds(timed[what]) for what in timed})
    seconds = pd.DataFrame(found)
    ratio = seconds.div(seconds[FORWARD], axis=0)
    table = {"seconds": seconds.median(), "ratio": ratio.median(), "least": ratio.min(), "most": ratio.max()}
    memory = pd.Series({what: mib for what, (_, mib) in first.items()})
    return pd.DataFrame({**table, "mib": memory}).rename_axis("what").reset_index()


def _seconds(thing: Callable[[], object]) -> float:
    start = time.perf_counter()
    thing()
    return time.perf_counter() - start


def _fresh(timed: Mapping[str, Callable[[], object]]) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Each thing when what was freed before it is the system's again, and the MiB that the process then holds."""
    for what, thing in timed.items():
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps what it may need again
            trim(0)
        yield what, thing, _status("VmRSS") if _reset_peak() else float("nan")


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float:
    """MiB of this process; NaN where there is no such file."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(name)), float("nan"))


def whole(network: nn.Module, batches: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """A forward pass over all batches, the moments that patterns need, and those that exact ρ needs, begun and ended:
    with a look at the network's layers before and the sums put together after."""
    fast = [fast_layout(images) for images in batches]
    return {
        FORWARD: _forward(canonical_form(network, fast[0][:1]), fast),
        PATTERNS: lambda: pb.collect_moments(network, fast, gram=False),
        EVERYTHING: lambda: pb.collect_moments(network, fast, gram=True),
    }


def steady(network: nn.Module, images: Tensor, **settings: Any) -> dict[str, Callable[[], object]]:
    """The same for one batch among many, without beginning and end."""
    fast = fast_layout(images)
    plain = canonical_form(network, fast[:1])
    return {
        FORWARD: _forward(plain, [fast]),
        PATTERNS: moment_pass(plain, fast, gram=False, **settings)[0],
        EVERYTHING: moment_pass(plain, fast, gram=True, **settings)[0],
    }


def _forward(network: nn.Module, batches: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            for images in batches:
                network(images)

    return run


def by_images(network: nn.Module, batches: Sequence[Tensor], counts: Sequence[int], repeats: int) -> pd.DataFrame:
    """:func:`measured` by number of images; each count is that of whole batches."""
    size = len(batches[0])
    tables = [measured(whole(network, batches[: n // size]), repeats).assign(images=n) for n in counts]
    return pd.concat(tables, ignore_index=True)


def by_layers(network: nn.Sequential, images: Tensor, counts: Sequence[int], repeats: int) -> pd.DataFrame:
    """:func:`measured` for the first k layers of a chain of modules, by k."""
    tables = []
    for k in counts:
        part = first_layers(network, k)
        tables.append(measured(steady(part, images), repeats).assign(layers=k))
    return pd.concat(tables, ignore_index=True)


def first_layers(network: nn.Sequential, k: int) -> nn.Sequential:
    """The chain up to its k-th convolution."""
    kept: list[nn.Module] = []
    for module in network:
        kept.append(module)
        k -= isinstance(module, nn.Conv2d)
        if not k:
            break
    return nn.Sequential(*kept).eval()


def by_width(widths: Sequence[int], images: int, repeats: int) -> pd.DataFrame:
    """:func:`measured` for one 3×3 convolution from C to C channels, and ρ of all its neurons (S_a+-, ``all``) from the
    moments, by C."""
    tables = []
    for width in widths:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(width, width, 3, padding=1)).eval().requires_grad_(False)
        x = torch.randn(images, width, SIDE, SIDE).relu()
        moments = pb.collect_moments(network, [fast_layout(x)])
        patterns = pb.fit_patterns(network, moments)
        once = {RHO: lambda m=moments, n=network, p=patterns: pb.evaluate(n, p, m, m)}
        table = measured({**steady(network, x), **once}, repeats)
        tables.append(table.assign(channels=width, bytes=held(moments)))
    return pd.concat(tables, ignore_index=True)


def by_positions(network: nn.Module, batch: Tensor, shares: Sequence[float], repeats: int) -> pd.DataFrame:
    """:func:`measured` by the share of positions that is sampled."""
    tables = [measured(steady(network, batch, positions=share), repeats).assign(share=share) for share in shares]
    return pd.concat(tables, ignore_index=True)


def by_network(networks: Mapping[str, nn.Module], batch: Tensor, repeats: int) -> pd.DataFrame:
    """:func:`measured` for whole networks, with operations per image as torch counts them and the moments' bytes."""
    tables = []
    for name, network in networks.items():
        timed = steady(network, batch)
        work = {what: counted(thing) / len(batch) for what, thing in timed.items()}
        moments = pb.collect_moments(network, [fast_layout(batch[:1])])
        table = measured(timed, repeats).assign(network=name, images=len(batch), bytes=held(moments))
        tables.append(table.assign(operations=table.what.map(work)))
    return pd.concat(tables, ignore_index=True)


def held(moments: LayerMoments) -> int:
    """Bytes of all sums, Gram matrices included."""
    return sum(t.numel() * t.element_size() for sums in moments.values() for t in sums.tensors().values())


def counted(thing: Callable[[], object]) -> int:
    """Multiplications and additions in float32 and float64 alike, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        thing()
    return counter.get_total_flops()


def storing(moments: LayerMoments, folder: str) -> float:
    """Bytes per second that a cache in ``folder`` writes and reads back, both with their checksum."""
    cache = Cache(folder)
    start = time.perf_counter()
    for layer, sums in moments.items():
        cache.save("moments", layer, sums.tensors(), {})
    for layer in moments:
        cache.load("moments", layer)
    return held(moments) / (time.perf_counter() - start)


def solve_rate(table: pd.DataFrame) -> float:
    """Float64 operations per second of ρ at the largest width of :func:`by_width`: one factorisation, four solved
    columns of each neuron, and one product with the test split's Gram matrix."""
    own = table[table.what == RHO].sort_values("channels").iloc[-1]
    n, d = int(own.channels), 9 * int(own.channels)
    return (d**3 / 3 + n * 5 * 2 * d**2) / float(own.seconds)


def exponent(table: pd.DataFrame, over: str, what: str, column: str = "seconds") -> float:
    """p of ``column`` ~ ``over``ᵖ, by least squares of the logarithms."""
    own = table[table.what == what]
    return float(np.polyfit(np.log(own[over]), np.log(own[column]), 1)[0])
