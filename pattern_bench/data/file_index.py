"""The images below a folder: listed once, kept in the cache, and held in a few large arrays.

The loader's workers are forks of the job. They share its memory until somebody writes to it, and reading an entry of a
Python list writes: it changes the entry's reference count. A list of ImageNet's 1.28 million names would so be copied,
page by page, into every worker. Arrays have one reference count each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from pattern_bench.data.image_files import LINKED, NAMED_AS_IMAGE, NO_FILE, is_hidden, suffix_of, suffixes
from pattern_bench.storage.cache import Cache, key_of

log = logging.getLogger(__name__)

LISTING_VERSION = 3
# Files whose size and time are compared before a kept listing is used: all of a folder up to this size, of a larger one
# so many, evenly spaced. A folder's own time shows what was added, removed, renamed or replaced, but not a file that
# was written anew in its place.
COMPARED = 20_000
# A folder that changed within these nanoseconds may change again without its time showing it.
SETTLED = 2_000_000_000


class Names(Sequence[str]):
    """Many strings in one block of bytes. Bytes that are no UTF-8 are shown as ``\\xNN``.

    Args:
        text: (bytes,) uint8, the strings one after the other.
        ends: (n,) int64, where each ends in ``text``.
        heads: what stands before the strings: ``heads[i]`` before those from ``firsts[i]`` on.
        firsts: rising, from 0.
    """

    def __init__(self, text: Tensor, ends: Tensor, heads: Sequence[str] = ("",), firsts: Sequence[int] = (0,)) -> None:
        self._made_of = text, ends, list(heads), list(firsts)
        # Views of the same memory, from which single values come faster than from tensors.
        self._text, self._ends = text.numpy().data, ends.numpy().data

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Names, self._made_of

    def __len__(self) -> int:
        return len(self._ends)

    def below(self, head: str) -> Names:
        """Return the same strings, each after ``head``."""
        return Names(*self._made_of[:2], [head])

    def path(self, index: int) -> str:
        """Return a string as the operating system takes it, whatever its bytes."""
        return os.fsdecode(self._bytes(index))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._bytes(range(len(self))[index]).decode(errors="backslashreplace")

    def _bytes(self, index: int) -> bytes:
        _, _, heads, firsts = self._made_of
        head = heads[bisect_right(firsts, index) - 1].encode()
        return head + self._text[self._ends[index - 1] if index else 0 : self._ends[index]]


@dataclass
class Listing:
    """The images below a folder, sorted by the parts of their paths.

    Attributes:
        names: paths below the folder, with ``/``.
        labels: the number in ``classes`` of the subfolder that each lies in; -1 for those in no subfolder.
        classes: the subfolders that hold images, sorted.
        fingerprint: a hash of every image's path, size and time of modification.
        left_out: how many files and folders are no images, by suffix, or by a reason of ``image_files.REASONS``; what
            lies in hidden or linked folders is not looked at.
    """

    names: Names
    labels: Sequence[int]
    classes: list[str]
    fingerprint: str
    left_out: dict[str, int]


def list_images(root: Path, cache: Cache | None, follow_links: bool = False) -> Listing:
    """List the images below ``root`` that Pillow reads, but for hidden ones; or take the listing of the cache.

    A kept listing is used as long as no folder below ``root`` has changed, nor any of the files that are compared
    (:data:`COMPARED`). Processes that ask at the same time list once.

    Args:
        root: the folder.
        cache: None lists anew.
        follow_links: look into folders that are links too. A link to a parent would then never end.
    """
    if cache is None:
        return _listing(*_walk(root, follow_links))
    key = key_of(
        version=LISTING_VERSION, folder=str(root.resolve()), follow_links=follow_links, suffixes=" ".join(suffixes())
    )
    with cache.lock("listings", key):
        entry = cache.load("listings", key)
        if entry is None or not _unchanged(root, entry[0]):
            now = time.time_ns()
            entry = _walk(root, follow_links)
            if bool(((entry[0]["folder_times"] - now).abs() > SETTLED).all()):
                cache.save("listings", key, *entry)
    return _listing(*entry)


def tensor_of(values: bytearray | array[int]) -> Tensor:
    """Return bytes as uint8, and integers as int64, in the same memory: (n,)."""
    dtype = torch.uint8 if isinstance(values, bytearray) else torch.int64
    return torch.frombuffer(values, dtype=dtype) if values else torch.zeros(0, dtype=dtype)


def numbers(values: Tensor) -> array[int]:
    """Return (n,) integers as a sequence of Python's."""
    return array("q", values.to(torch.int64).numpy().tobytes())


def _listing(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Listing:
    names = Names(tensors["names"], tensors["ends"])
    classes, left_out = json.loads(metadata["classes"]), json.loads(metadata["left_out"])
    return Listing(names, numbers(tensors["labels"]), classes, metadata["fingerprint"], left_out)


def _walk(root: Path, follow_links: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The listing as a cache entry: tensors and metadata."""
    names, folders = bytearray(), bytearray()
    columns = {name: array("q") for name in ("ends", "labels", "sizes", "times", "folder_ends", "folder_times")}
    classes: list[str] = []
    digest = hashlib.sha256()
    left_out: Counter[str] = Counter()
    endings = frozenset(suffixes())

    def visit(below: bytes) -> None:
        folder = os.path.join(os.fsencode(root), below)
        try:
            # The time first: what changes during the listing is then seen the next time.
            changed = os.stat(folder).st_mtime_ns
            with os.scandir(folder) as unsorted:
                entries = sorted(unsorted, key=lambda entry: entry.name)
        except OSError as error:
            log.warning("%s is left out: it cannot be read (%s)", os.fsdecode(folder), error.strerror)
            left_out["unreadable folder"] += 1
            changed, entries = -1, []  # a time that no folder has: the listing will not be used again
        folders.extend(below)
        columns["folder_ends"].append(len(folders))
        columns["folder_times"].append(changed)
        for entry in entries:
            path = below + b"/" + entry.name if below else entry.name
            name = os.fsdecode(entry.name)
            if is_hidden(name):
                left_out["hidden"] += 1
            elif _is(entry.is_dir):
                if entry.is_symlink() and not follow_links:
                    left_out[LINKED] += 1
                    continue
                before = len(columns["ends"])
                visit(path)
                if suffix_of(name) in endings and len(columns["ends"]) == before:
                    left_out[NAMED_AS_IMAGE] += 1
            elif not (_is(entry.is_file) or entry.is_symlink()):
                left_out[NO_FILE] += 1
            elif (suffix := suffix_of(name)) not in endings:
                left_out[suffix] += 1
            else:
                size, modified = _size_and_time(entry)
                names.extend(path)
                columns["ends"].append(len(names))
                columns["sizes"].append(size)
                columns["times"].append(modified)
                columns["labels"].append(label(path))
                digest.update(b"%b\0%d\0%d\n" % (path, size, modified))

    def label(path: bytes) -> int:
        first, slash, _ = path.partition(b"/")
        if not slash:
            return -1
        if not classes or os.fsencode(classes[-1]) != first:
            classes.append(os.fsdecode(first))
        return len(classes) - 1

    visit(b"")
    tensors = {"names": tensor_of(names), "folders": tensor_of(folders)}
    tensors |= {name: tensor_of(column) for name, column in columns.items()}
    metadata = {"classes": json.dumps(classes), "fingerprint": digest.hexdigest()}
    return tensors, {**metadata, "left_out": json.dumps(left_out, ensure_ascii=True)}


def _is(question: Callable[[], bool]) -> bool:
    """A directory entry's ``is_dir`` or ``is_file``; False for a link that cannot be followed."""
    try:
        return question()
    except OSError:
        return False


def _size_and_time(file: os.DirEntry[bytes] | Path) -> tuple[int, int]:
    """In bytes and nanoseconds; (-1, 0) for a link that leads nowhere."""
    try:
        stat = os.stat(file)
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _unchanged(root: Path, kept: dict[str, Tensor]) -> bool:
    """Whether a kept listing still holds."""
    folders = Names(kept["folders"], kept["folder_ends"])
    files = Names(kept["names"], kept["ends"])
    try:
        times = [(root / folders.path(i)).stat().st_mtime_ns for i in range(len(folders))]
    except OSError:
        return False
    if times != kept["folder_times"].tolist():
        return False
    compared = torch.linspace(0, len(files) - 1, min(len(files), COMPARED), dtype=torch.float64).long()
    now = [_size_and_time(root / files.path(i)) for i in compared.tolist()]
    return now == list(zip(kept["sizes"][compared].tolist(), kept["times"][compared].tolist(), strict=True))
