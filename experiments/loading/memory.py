"""Memory: over a whole pass, and of an index of ImageNet's size."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import nn

from experiments.loading.images import jpegs, shard_source, split_of, write_shards
from pattern_bench.data.file_index import Names, numbers, tensor_of
from pattern_bench.engine.statistics_streams import MomentStream
from pattern_bench.storage.cache import Cache

IMAGENET = 1_281_167


def memory(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process in MiB, and the part of it that no other process shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"resident": kib["Rss"] / 1024, "private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024}


class Watch(pl.Callback):
    """Memory of the job and of its workers, every ``every`` images."""

    def __init__(self, every: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.every, self.start = every, time.perf_counter()

    def on_predict_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        seen = module.seen.images
        if seen // self.every == len(self.rows):
            return
        workers = [memory(str(child.pid)) for child in multiprocessing.active_children()]
        self.rows.append(
            {
                "images": seen,
                "seconds": time.perf_counter() - self.start,
                "job": memory()["resident"],
                **{f"worker {i}": worker["private"] for i, worker in enumerate(workers)},
            }
        )


def epoch(images: Path, work: Path, count: int, workers: int) -> tuple[pd.DataFrame, float]:
    """A pass over ``count`` small images in shards, through the job's own loader, stream and sums.

    Returns:
        Rows of :class:`Watch`; seconds that the index of the shards took.
    """
    files = jpegs(images, 100, 87)
    root = write_shards(files, work / "epoch", count, 2500)
    start = time.perf_counter()
    split = split_of(shard_source(root), 64, Cache(str(work / "cache")))
    indexed = time.perf_counter() - start
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()).eval()
    watch = Watch(1000)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watch],
    )  # fmt: skip
    stream = MomentStream(network, ["0"], gram=True, memory=2**28, positions=1.0, seeds={"0": 0})
    trainer.predict(stream, split.loader(split.share(32), 32, workers), return_predictions=False)
    if (stream.seen.images, stream.seen.unreadable) != (count, []):
        raise RuntimeError(f"not every image was seen once: {stream.seen}")
    return pd.DataFrame(watch.rows), indexed


def as_arrays() -> Iterator[Any]:
    """ImageNet's index and a split's permutation as the suite holds them."""
    text = "".join(f"n{i % 1000:08}_{i:05}.JPEG" for i in range(IMAGENET)).encode()
    ends = torch.tensor([len(f"n{i % 1000:08}_{i:05}.JPEG") for i in range(IMAGENET)]).cumsum(0)
    names = Names(
        tensor_of(bytearray(text)), ends, [f"train-{i:06}.tar/" for i in range(147)], range(0, IMAGENET, 8716)
    )
    yield names, numbers(torch.arange(IMAGENET) % 1000), torch.arange(IMAGENET) * 110_000, torch.arange(IMAGENET)
    yield torch.randperm(IMAGENET)


def as_lists() -> Iterator[Any]:
    """The same as Python lists."""
    names = [f"train-{i // 8716:06}.tar/n{i % 1000:08}_{i:05}.JPEG" for i in range(IMAGENET)]
    offsets = [110_000 * i for i in range(IMAGENET)]
    yield names, [1000 + i % 1000 for i in range(IMAGENET)], offsets, [1000 + i for i in range(IMAGENET)]
    yield torch.randperm(IMAGENET).tolist()


def full_size(make: Callable[[], Iterator[Any]], results: Any) -> None:
    """Puts the memory of an index of ImageNet's size: its own, and what a worker adds that reads all of it."""
    before = memory()["private"]
    index, order = make()
    own = memory()["private"] - before

    def read_all() -> None:
        start = memory()["private"]
        for k in range(IMAGENET):
            i = int(order[k])
            for column in index:
                column[i]
        results.put(memory()["private"] - start)

    results.put(own)
    reader = multiprocessing.get_context("fork").Process(target=read_all)
    reader.start()
    reader.join()


def full_sizes() -> dict[str, tuple[float, float]]:
    """MiB of an index of ImageNet's size, as arrays and as lists: its own, and what a worker adds."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name, make in (("arrays", as_arrays), ("lists", as_lists)):
        results = context.SimpleQueue()
        process = context.Process(target=full_size, args=(make, results))
        process.start()
        found[name] = results.get(), results.get()
        process.join()
    return found
