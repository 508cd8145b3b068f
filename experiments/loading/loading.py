"""Measures how images reach the network: ``python experiments/loading/loading.py --images PHOTOS``.

Writes README.md and memory.csv beside itself. Linux only: memory comes from /proc.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pattern_bench.data.base import Source, photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.file_index import Names, numbers, tensor_of
from pattern_bench.data.folder import Folder, FolderPool
from pattern_bench.data.shards import Shards
from pattern_bench.data.splits import Split, make_splits
from pattern_bench.engine.statistics_streams import MomentStream
from pattern_bench.results.schema import write_csv
from pattern_bench.storage.cache import Cache

IMAGENET = 1_281_167
# What ImageNet's photographs have on average, about: 500×375 pixels and 110 KB.
USUAL_SIDE, USUAL_QUALITY = 375, 94
# An assumption: what a fast GPU sustains on float32 convolutions, and multiplications and additions of a forward pass.
GPU_FLOPS, FORWARDS = 50e12, 3.9
FORWARD_FLOPS = {"VGG-16": 31e9, "ResNet-18": 3.6e9}
SOURCES: dict[str, Any] = {
    "name": "photographs", "fit": 0.5, "probe": 0.5, "validation": 1.0, "limit": None, "batch_size": 32, "workers": 0,
    "strict": False,
}  # fmt: skip


def jpegs(images: Path, side: int | None, quality: int) -> list[bytes]:
    """The photographs as JPEG files, resized to a short side unless it is None."""
    pool, made = FolderPool(str(images), "--images"), []
    for i in range(len(pool.ids)):
        if side is None:
            made.append((images / pool.ids.path(i)).read_bytes())
            continue
        content = io.BytesIO()
        v2.functional.resize(pool.image(i), [side]).save(content, "jpeg", quality=quality)
        made.append(content.getvalue())
    return made


def write_folder(files: list[bytes], folder: Path) -> Path:
    for i, content in enumerate(files):
        file = folder / f"{i % 10}" / f"{i:07}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def write_shards(files: list[bytes], folder: Path, count: int, per_shard: int, distinct: int = 20) -> Path:
    """``count`` images, the files again and again under keys of their own. Whole shards after the first ``distinct``
    are links to these, which spares the disk and is all the same to a reader."""
    folder.mkdir()
    for first in range(0, count, per_shard):
        number, last = first // per_shard, min(first + per_shard, count)
        place = folder / f"train-{number:06}.tar"
        if number >= distinct and last - first == per_shard:
            place.hardlink_to(folder / f"train-{number % distinct:06}.tar")
            continue
        with tarfile.open(place, "w") as shard:
            for i in range(first, last):
                for ending, content in (("cls", b"%d" % (i % 10)), ("jpg", files[i % len(files)])):
                    member = tarfile.TarInfo(f"{i:07}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    return folder


def split_of(source: Source, size: int, cache: Cache | None = None) -> Split:
    """All images of a source, as the job's validation split is made."""
    source.cache = cache
    split = make_splits(source, 0)["validation"]
    split.transform = photograph_transform(size)
    return split


def folder_source(root: Path) -> Source:
    return Folder(**SOURCES, root=str(root), validation_root=str(root), size=224)


def shard_source(root: Path) -> Source:
    return Shards(**SOURCES, root=str(root), validation_root=str(root), classes=None, shards_kept=8, size=224)


def rate(split: Split, workers: int) -> float:
    """Images per second of the loader alone, its workers' start included."""
    start, seen = time.perf_counter(), 0
    for batch in split.loader(split.share(32), 32, workers):
        seen += len(batch.images)
    return seen / (time.perf_counter() - start)


def loader_rates(images: Path, work: Path, repeats: int) -> pd.DataFrame:
    rows = []
    for kind, side in (("short side 256", None), ("short side 375", USUAL_SIDE)):
        files = jpegs(images, side, USUAL_QUALITY)
        roots = (
            write_folder(files, work / f"folder {kind}"),
            write_shards(files, work / f"shards {kind}", len(files), 250),
        )
        splits = {"folder": split_of(folder_source(roots[0]), 224), "shards": split_of(shard_source(roots[1]), 224)}
        for _ in range(repeats):
            for (source, split), workers in itertools.product(splits.items(), (0, 1, 2)):
                rows.append((kind, sum(map(len, files)) / len(files), source, workers, rate(split, workers)))
    return pd.DataFrame(rows, columns=["kind", "bytes", "source", "workers", "rate"])


def decoders() -> dict[str, Callable[[bytes], Tensor]]:
    """Ways from a JPEG file to the network's input."""
    exact, onwards = photograph_transform(224), v2.Compose(
        [v2.Resize(224, antialias=True), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )  # fmt: skip

    def drafted(content: bytes) -> Tensor:
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (224, 224))
        return exact(image.convert("RGB"))

    def torchvisions(content: bytes) -> Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)

    return {
        "PIL (what the suite does)": lambda content: exact(decode(io.BytesIO(content))),
        "PIL, at half size where that is enough (`draft`)": drafted,
        "`torchvision.io.decode_jpeg`, the rest as now": lambda content: exact(
            v2.functional.to_pil_image(torchvisions(content))
        ),
        "`torchvision.io.decode_jpeg`, resized as a tensor": lambda content: onwards(torchvisions(content)),
    }


def decoder_rates(images: Path, repeats: int) -> pd.DataFrame:
    rows = []
    for kind, side in (("short side 256", None), ("short side 375", USUAL_SIDE), ("short side 500", 500)):
        files = jpegs(images, side, USUAL_QUALITY)[:200]
        reference = [decoders()["PIL (what the suite does)"](content) for content in files]
        apart = {
            name: max(float((way(content) - r).abs().max()) for content, r in zip(files, reference, strict=True))
            for name, way in decoders().items()
        }
        for _, (name, way) in itertools.product(range(repeats), decoders().items()):
            start = time.perf_counter()
            for content in files:
                way(content)
            # The largest difference in grey values of 255, by the mean of the channels' standard deviations.
            rows.append((kind, name, len(files) / (time.perf_counter() - start), apart[name] * 0.226 * 255))
    return pd.DataFrame(rows, columns=["kind", "way", "rate", "apart"])


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


def epoch(images: Path, work: Path, count: int, workers: int) -> pd.DataFrame:
    """A pass over ``count`` small images in shards, through the job's own loader, stream and sums."""
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
    found = pd.DataFrame(watch.rows)
    found.attrs |= {"index": indexed, "count": count}
    return found


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
    context, found = multiprocessing.get_context("spawn"), {}
    for name, make in (("arrays", as_arrays), ("lists", as_lists)):
        results = context.SimpleQueue()
        process = context.Process(target=full_size, args=(make, results))
        process.start()
        found[name] = results.get(), results.get()
        process.join()
    return found


def wrapped(text: str) -> str:
    """Markdown with its paragraphs, and nothing else, filled to 120 columns."""
    blocks = [
        block if block.startswith(("#", "|", "`")) else textwrap.fill(block, 120, break_on_hyphens=False)
        for block in text.strip().split("\n\n")
    ]
    return "\n\n".join(blocks) + "\n"


def report(
    rates: pd.DataFrame, ways: pd.DataFrame, watched: pd.DataFrame, sizes: dict[str, tuple[float, float]]
) -> str:
    def spread(values: pd.Series) -> str:
        return f"{statistics.median(values):.0f} ({values.min():.0f} to {values.max():.0f})"

    def hours(per_second: float) -> str:
        minutes = IMAGENET / per_second / 60
        return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"

    lines = []
    keys: Any
    for keys, part in rates.groupby(["kind", "bytes"], sort=False):
        kind, size = keys
        for source, of in part.groupby("source", sort=False):
            cells = [spread(of.rate[of.workers == workers]) for workers in (0, 1, 2)]
            lines.append(f"| {kind}, {size / 1000:.0f} KB | {source} | {' | '.join(cells)} |")
    usual = rates[(rates.kind == "short side 375") & (rates.source == "shards")]
    one, two = (float(usual.rate[usual.workers == workers].median()) for workers in (1, 2))
    need = " and ".join(f"{GPU_FLOPS / (FORWARDS * flops):,.0f} ({name})" for name, flops in FORWARD_FLOPS.items())
    decoding = [
        f"| {way} | "
        + " | ".join(f"{spread(of.rate)}, {of.apart.max():.0f}" for _, of in part.groupby("kind", sort=False))
        + " |"
        for way, part in ways.groupby("way", sort=False)
    ]
    workers = [column for column in watched.columns if column.startswith("worker")]
    step = max(1, len(watched) // 10)
    pass_lines = [
        f"| {int(row.images):,} | {row.seconds:.0f} | {row.job:.0f} | {' | '.join(f'{row[w]:.0f}' for w in workers)} |"
        for _, row in watched.iloc[[0, *range(step - 1, len(watched), step)]].drop_duplicates("images").iterrows()
    ]
    early, late = (
        {name: watched[name][(watched.images > first) & (watched.images <= last)] for name in ("job", *workers)}
        for first, last in ((10_000, 30_000), (watched.images.max() - 20_000, watched.images.max()))
    )
    grown = [f"{early[name].median():.0f} and {late[name].median():.0f} ({name})" for name in early]
    speed = float(watched.images.iloc[-1] / watched.seconds.iloc[-1])
    more = f"; *extrapolated*, {IMAGENET:,} such images would take {hours(speed)}"
    if watched.attrs["count"] >= IMAGENET:
        more = ""
    arrays, lists = sizes["arrays"], sizes["lists"]
    return f"""# Loading: what an epoch of ImageNet asks of the loader

**Question.** How many images per second reach the network, from a folder and from shards? Does memory stay where it
is over an epoch? And what does the index of 1.28 million images cost?

```bash
python experiments/loading/loading.py --images PHOTOS --count {watched.attrs["count"]}
```

This page is written by that command. Machine: {os.cpu_count()} cores of {platform.machine()} (load average
{rates.attrs["load"]:.1f} at the start: others were at work, so take ranges seriously), PyTorch {torch.__version__},
torchvision {torchvision.__version__}, {rates.attrs["photographs"]:,} ImageNet photographs, files in the page cache.

## The loader alone

Images per second to 224×224 float32, in batches of 32, median (range) of {len(usual) // 3}. Short side 256: the files
as they are. Short side 375: the same enlarged, about the size of ImageNet's originals.

| images | from | 0 workers | 1 worker | 2 workers |
|---|---|---|---|---|
{chr(10).join(lines)}

*Extrapolated, not measured:* 16 workers on 16 cores, each at the rate of the one above ({one:.0f}/s at short side 375),
would load {16 * one:,.0f} images per second and pass over ImageNet in {hours(16 * one)}. The two workers here would
take {hours(two)}. A GPU that sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s (an assumption) asks for {need} images per second,
at {FORWARDS} forward passes for everything that exact ρ needs ([benchmark](../benchmark/README.md)).

## Other decoders

Images per second in one process with all transforms, median (range); then the largest difference from what the suite
does, in grey values of 255.

| way | short side 256 | short side 375 | short side 500 |
|---|---|---|---|
{chr(10).join(decoding)}

## A whole pass

{watched.attrs["count"]:,} JPEGs of short side 100 in shards of 2,500 ({watched.attrs["index"]:.0f} s for their
index, once), through the job's loader ({len(workers)}
workers), Lightning loop and `MomentStream`, with one convolution for a network. MiB: the job's resident memory, and
what each worker does not share with it. Every 1,000 images: [memory.csv](memory.csv).

| images | seconds | job | {" | ".join(workers)} |
|---|---|---|{"---|" * len(workers)}
{chr(10).join(pass_lines)}

Median of images 10,000 to 30,000 and of the last 20,000, in MiB: {", ".join(grown)}. {speed:.0f} images per
second{more}.

## An index of full size

1,281,167 entries (made up): names, labels, offsets and sizes, and the permutation that splits are drawn by. MiB of the
job, and what a forked worker adds that reads every entry once:

| held as | job | each worker |
|---|---|---|
| arrays (the suite) | {arrays[0]:.0f} | {arrays[1]:.0f} |
| Python lists | {lists[0]:.0f} | {lists[1]:.0f} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=50_000, help="images of the pass")
    parser.add_argument("--workers", type=int, default=2, help="its workers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of README.md and memory.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    sizes = full_sizes()
    print(sizes, flush=True)
    with tempfile.TemporaryDirectory() as work:
        watched = epoch(arguments.images, Path(work), arguments.count, arguments.workers)
        print(watched, flush=True)
    with tempfile.TemporaryDirectory() as work:
        rates = loader_rates(arguments.images, Path(work), arguments.repeats)
    rates.attrs["load"], rates.attrs["photographs"] = load, len(FolderPool(str(arguments.images), "--images").ids)
    print(rates, flush=True)
    ways = decoder_rates(arguments.images, arguments.repeats)
    write_csv(arguments.output / "memory.csv", watched.round(1))
    (arguments.output / "README.md").write_text(wrapped(report(rates, ways, watched, sizes)))


if __name__ == "__main__":
    main()
