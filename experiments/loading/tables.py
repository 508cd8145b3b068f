"""The results on the page, from what was measured."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
from typing import Any

import pandas as pd
import torch
import torchvision

from experiments.loading.memory import IMAGENET
from experiments.loading.rates import USUAL, WORKERS
from experiments.pages import markdown

# An assumption: what a fast GPU sustains on float32 convolutions, and multiplications and additions of a forward pass.
GPU_FLOPS, FORWARDS = 50e12, 3.9
FORWARD_FLOPS = {"VGG-16": 31e9, "ResNet-18": 3.6e9}


def machine(load: float, photographs: int) -> str:
    """What was measured on, and with what.

    Args:
        load: the load average at the start.
        photographs: how many.
    """
    return filled(
        f"Machine: {os.cpu_count()} cores of {platform.machine()} (load average {load:.1f} at the start; what is above "
        f"0 is others' work, so take ranges seriously), PyTorch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, {photographs:,} photographs, files in the page cache."
    )


def of_loader(rates: pd.DataFrame) -> str:
    """Images per second of the loader by kind of image, source and workers; and what larger machines would need."""
    keys: Any
    lines = []
    for keys, part in rates.groupby(["kind", "bytes", "source"], sort=False):
        kind, size, source = keys
        line = {"images": f"{kind}, {size / 1000:.0f} KB", "from": source}
        lines.append(line | {workers_named(n): median_and_range(part.rate[part.workers == n]) for n in WORKERS})
    usual = rates[(rates.kind == USUAL) & (rates.source == "shards")]
    one, two = (float(usual.rate[usual.workers == workers].median()) for workers in (1, 2))
    need = " and ".join(f"{GPU_FLOPS / (FORWARDS * flops):,.0f} ({name})" for name, flops in FORWARD_FLOPS.items())
    more = filled(
        f"*Extrapolated, not measured:* 16 workers on 16 cores, each at the rate of the one above ({one:.0f}/s at "
        f"{USUAL}), would load {16 * one:,.0f} images per second and pass over ImageNet in {duration(16 * one)}. The "
        f"two workers here would take {duration(two)}. A GPU that sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s (an "
        f"assumption) asks for {need} images per second, at {FORWARDS} forward passes for everything that exact ρ "
        "needs ([benchmark](../benchmark/README.md))."
    )
    return f"{markdown(pd.DataFrame(lines))}\n\nMedian (range) of {len(usual) // len(WORKERS)}.\n\n{more}"


def workers_named(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def of_decoders(ways: pd.DataFrame) -> str:
    """Images per second, and the largest difference in grey values, by way and kind of image."""
    lines = [
        {"way": way}
        | {kind: f"{median_and_range(of.rate)}, {of.apart.max():.0f}" for kind, of in part.groupby("kind", sort=False)}
        for way, part in ways.groupby("way", sort=False)
    ]
    return markdown(pd.DataFrame(lines))


def of_pass(watched: pd.DataFrame, count: int, index_seconds: float) -> str:
    """Memory of the job and its workers over a pass: some rows of it, what it has grown by, and its speed.

    Args:
        watched: columns ``images``, ``seconds``, ``job`` and ``worker K``, in MiB.
        count: images of the pass.
        index_seconds: that the index of the shards took.
    """
    workers = [column for column in watched.columns if column.startswith("worker")]
    step = max(1, len(watched) // 10)
    shown = watched.iloc[[0, *range(step - 1, len(watched), step)]].drop_duplicates("images")
    lines = [
        {"images": f"{int(row.images):,}"} | {name: f"{row[name]:.0f}" for name in ("seconds", "job", *workers)}
        for _, row in shown.iterrows()
    ]
    last = watched.images.max()
    early, late = (
        {name: watched[name][(watched.images > first) & (watched.images <= end)] for name in ("job", *workers)}
        for first, end in ((10_000, 30_000), (last - 20_000, last))
    )
    grown = ", ".join(f"{early[name].median():.0f} and {late[name].median():.0f} ({name})" for name in early)
    speed = float(watched.images.iloc[-1] / watched.seconds.iloc[-1])
    more = "" if count >= IMAGENET else f"; *extrapolated*, {IMAGENET:,} such images would take {duration(speed)}"
    about = filled(
        f"{count:,} JPEGs ({index_seconds:.0f} s for the index of their shards, once), {workers_named(len(workers))}. "
        f"Median of images 10,000 to 30,000 and of the last 20,000, in MiB: {grown}. {speed:.0f} images per "
        f"second{more}."
    )
    return f"{markdown(pd.DataFrame(lines))}\n\n{about}"


def of_index(sizes: dict[str, tuple[float, float]]) -> str:
    """MiB of an index of ImageNet's size, by how it is held."""
    titles = {"arrays": "arrays (the suite)", "lists": "Python lists"}
    lines = [
        {"held as": title, "job": f"{sizes[name][0]:.0f}", "each worker": f"{sizes[name][1]:.0f}"}
        for name, title in titles.items()
    ]
    return markdown(pd.DataFrame(lines))


def median_and_range(values: pd.Series) -> str:
    return f"{statistics.median(values):.0f} ({values.min():.0f} to {values.max():.0f})"


def duration(per_second: float) -> str:
    """Of a pass over ImageNet at so many images per second."""
    minutes = IMAGENET / per_second / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def filled(text: str) -> str:
    """A paragraph of lines of 120 columns."""
    return textwrap.fill(text, 120, break_on_hyphens=False)
