"""Images per second: of the loader, from folders and shards, and of ways to decode."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from experiments.loading.images import (
    USUAL_QUALITY,
    USUAL_SIDE,
    folder_source,
    jpegs,
    shard_source,
    split_of,
    write_folder,
    write_shards,
)
from pattern_bench.data.base import photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.splits import Split

USUAL = f"short side {USUAL_SIDE}"
KINDS = {"short side 256": None, USUAL: USUAL_SIDE}
"""Sizes of the JPEG files, by name; None for the files as they are."""
WORKERS = (0, 1, 2)
REFERENCE = "PIL (what the suite does)"


def rate(split: Split, workers: int) -> float:
    """Images per second of the loader alone, its workers' start included."""
    start, seen = time.perf_counter(), 0
    for batch in split.loader(split.share(32), 32, workers):
        seen += len(batch.images)
    return seen / (time.perf_counter() - start)


def loader_rates(images: Path, work: Path, repeats: int) -> pd.DataFrame:
    """The loader's rate by kind of image, source and number of workers, a row for each repeat; ``bytes`` is the mean
    size of a file.

    Args:
        images: folder of photographs.
        work: folder that has room for their copies.
        repeats: rounds.
    """
    rows = []
    for kind, side in KINDS.items():
        files = jpegs(images, side, USUAL_QUALITY)
        roots = (
            write_folder(files, work / f"folder {kind}"),
            write_shards(files, work / f"shards {kind}", len(files), 250),
        )
        splits = {"folder": split_of(folder_source(roots[0]), 224), "shards": split_of(shard_source(roots[1]), 224)}
        for _ in range(repeats):
            for (source, split), workers in itertools.product(splits.items(), WORKERS):
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
        REFERENCE: lambda content: exact(decode(io.BytesIO(content))),
        "PIL, at half size where that is enough (`draft`)": drafted,
        "`torchvision.io.decode_jpeg`, the rest as now": lambda content: exact(
            v2.functional.to_pil_image(torchvisions(content))
        ),
        "`torchvision.io.decode_jpeg`, resized as a tensor": lambda content: onwards(torchvisions(content)),
    }


def decoder_rates(images: Path, repeats: int) -> pd.DataFrame:
    """Images per second by way to decode and kind of image, a row for each repeat; ``apart`` is the largest difference
    from what the suite does, in grey values of 255."""
    rows = []
    for kind, side in (KINDS | {"short side 500": 500}).items():
        files = jpegs(images, side, USUAL_QUALITY)[:200]
        reference = [decoders()[REFERENCE](content) for content in files]
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
