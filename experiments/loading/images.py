"""Photographs as folders and shards, and the splits that a job would make of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from pattern_bench.data.base import photograph_transform
from pattern_bench.data.folder import Folder, FolderPool
from pattern_bench.data.shards import Shards
from pattern_bench.data.splits import Split, make_splits
from pattern_bench.storage.cache import Cache

# What ImageNet's photographs have on average, about: 500×375 pixels and 110 KB.
USUAL_SIDE, USUAL_QUALITY = 375, 94
SETTINGS: dict[str, Any] = {
    "name": "photographs", "fit": 0.5, "probe": 0.5, "validation": 1.0, "limit": None, "batch_size": 32, "workers": 0,
    "strict": False,
}  # fmt: skip
"""Of every data set here."""


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
    """The files in ten subfolders."""
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


def split_of(source: Folder | Shards, size: int, cache: Cache | None = None) -> Split:
    """All images of a source, as the job's validation split is made."""
    source.cache = cache
    split = make_splits(source, 0)["validation"]
    split.transform = photograph_transform(size)
    return split


def folder_source(root: Path) -> Folder:
    """The data set that ``data=folder`` makes of a folder."""
    return Folder(**SETTINGS, root=str(root), validation_root=str(root), size=224)


def shard_source(root: Path) -> Shards:
    """The data set that ``data=shards`` makes of a folder of shards."""
    return Shards(**SETTINGS, root=str(root), validation_root=str(root), classes=None, shards_kept=8, size=224)
