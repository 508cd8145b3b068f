"""The clock: each row in turn, its ratio to the forward pass, the memory it takes, and the floor under its time.

The floor is the larger of two times: a row's operations (torch's own count) over the rate of large matrix products (or
of a large convolution, where that is faster), and the bytes that its operations read and write over the rate of a large
copy; both rates are measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from experiments.benchmark.rows import FORWARD
from pattern_bench.engine.streams import fast_layout


def measure(
    timed: Mapping[str, Callable[[], object]], cuda: bool, repeats: int, matrix: float, copy: float
) -> pd.DataFrame:
    """Each row's median ``seconds``; ``ratio`` to the forward pass of the same repeat, median, ``least`` and ``most``;
    its floor, its distance from that, and which of the two times the floor is.

    Args:
        timed: the rows, by name.
        cuda: whether they run on a GPU.
        repeats: rounds after the first, which warms up.
        matrix: operations per second.
        copy: bytes per second.
    """
    with torch.no_grad():
        counts = {name: counted(function) for name, function in timed.items()}
        memory = {name: peak_memory(function, cuda) for name, function in timed.items()}
        seconds = {name: [best(function, cuda, 1)] for name, function in timed.items()}
        for _ in range(repeats):
            for name, function in timed.items():
                seconds[name].append(best(function, cuda, 1))
    table = pd.DataFrame(seconds).iloc[1:]  # the first repeat warms up
    ratios = table.div(table[FORWARD], axis=0)
    columns = {"seconds": table.median(), "ratio": ratios.median(), "least": ratios.min(), "most": ratios.max()}
    measured = pd.DataFrame(columns)
    work = pd.DataFrame(counts, index=["operations", "bytes"]).T
    by_operations, by_bytes = work.operations / matrix, work.bytes / copy
    measured["floor_seconds"] = pd.concat([by_operations, by_bytes], axis=1).max(axis=1)
    measured["of_floor"] = measured.seconds / measured.floor_seconds
    measured["floor_is"] = (by_operations >= by_bytes).map({True: "operations", False: "bytes"})
    measured["gflop"], measured["gbyte"] = work.operations / 1e9, work.bytes / 1e9
    measured["peak_memory_mib"] = pd.Series(memory)
    return measured.rename_axis("what").reset_index()


class Work(TorchDispatchMode):
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
    with Work() as work:
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
