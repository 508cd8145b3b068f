"""Images in tar files of WebDataset's layout, on a disk or in an object store.

A shard holds ``KEY.jpg`` (or another type of image) and beside it ``KEY.cls`` (the class index) or ``KEY.json`` (with
``label`` or ``cls``); the key is the name up to its first dot. One pass over the headers finds where the images are;
the cache keeps their places. An image is then read by its offset, so that any image can be had at any time, as the
protocol's seeded splits need.

The layout is WebDataset's, the library is not used: it reads forwards only, and its readers run shell commands
(``pipe:``) and unpickle (``.pyd``). fsspec opens the files, Python's tarfile reads the headers. Nothing is unpacked to
a disk, so that no name in a shard can lead out of a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import posixpath
import tarfile
import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import accumulate
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from pattern_bench.configuration.rules import Rule, check_arguments, is_text, is_whole, whole_number
from pattern_bench.data.base import FILES, Pool, Source, photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.file_index import Names, numbers, tensor_of
from pattern_bench.data.image_files import NO_FILE, NO_SUFFIX, counted, is_hidden, suffixes
from pattern_bench.data.remote import File, Store, describe, find, plain, read_part
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache, key_of

log = logging.getLogger(__name__)

Index = tuple[dict[str, Tensor], dict[str, str]]

INDEX_VERSION = 3
ROUND_TRIP_BYTES = 4 * 2**20
"""Bytes of a download that arrive in the time of one request, which is what a single image of a remote shard costs. A
shard is downloaded when its single images have cost what the download does."""
IN_A_ROW = 8
"""Images in a row from one shard after which the next shard will be wanted too."""
OPEN = 4
"""Files that a process keeps open."""
LABEL_BYTES = 2**20
"""Bytes of a file with a label; larger ones hold something else."""
# What tarfile raises, besides its own errors, at headers that are none.
_UNFORESEEN = (ValueError, OverflowError, RecursionError, MemoryError)


class ShardPool(Pool):
    """The images of some shards, in the shards' order.

    Args:
        shards: the files.
        heads: the beginnings of the ids, one for each shard.
        store: where remote shards are kept; None where there are none.
        cache: keeps the index of each shard; None indexes anew.

    Raises:
        UserError: where a shard cannot be opened, a label is no class index, or some images have a label and some none.
    """

    sequential = True

    def __init__(self, shards: Sequence[File], heads: Sequence[str], store: Store | None, cache: Cache | None) -> None:
        self.shards, self.store = list(shards), store
        setting = self.shards[0].setting
        kept = [_kept_index(shard, cache) for shard in self.shards]
        if None in kept:
            log.info("%s: indexing %d of %d shards, once", setting, kept.count(None), len(kept))
        entries = [entry or _made_index(shard, store, cache) for shard, entry in zip(self.shards, kept, strict=True)]
        columns = {name: [tensors[name] for tensors, _ in entries] for name in entries[0][0]}
        counts = [len(offsets) for offsets in columns["offsets"]]
        if not sum(counts):
            raise UserError(f"{setting}: no image in {len(shards)} shards: give shards with {' '.join(suffixes())}")
        self.firsts = [0, *accumulate(counts)][:-1]
        text_before = [0, *accumulate(len(text) for text in columns["names"])]
        ends = [ends + before for ends, before in zip(columns["ends"], text_before, strict=False)]
        self.ids = Names(torch.cat(columns["names"]), torch.cat(ends), [f"{head}/" for head in heads], self.firsts)
        self.offsets, self.sizes = torch.cat(columns["offsets"]), torch.cat(columns["sizes"])
        self.labels, self.classes = self._labels(torch.cat(columns["labels"]), setting)
        digest = hashlib.sha256()
        for shard, (_, metadata) in zip(self.shards, entries, strict=True):
            name = posixpath.basename(plain(shard.place))
            digest.update(f"{name}\0{shard.size}\0{shard.version}\0{metadata['digest']}\n".encode())
            if metadata["cut"]:
                log.warning("%s: %s", shard, metadata["cut"])
        self.fingerprint = digest.hexdigest()
        left_out: Counter[str] = Counter()
        for _, metadata in entries:
            left_out.update(json.loads(metadata["left_out"]))
        if said := counted(left_out):
            log.log(logging.WARNING if set(left_out) - {"hidden"} else logging.INFO, "%s: %s", setting, said)
        if store is not None and len(shards) > store.kept and not all(shard.parts for shard in shards):
            log.warning(
                "%s: the server gives no parts of files, so that an image out of the shards' order may cost a shard: "
                "raise data.shards_kept to %d, or take a server with range requests", setting, len(shards)
            )  # fmt: skip
        self._asked: Counter[int] = Counter()  # single images by shard, since it was last downloaded
        self._row = (-1, 0)  # the shard of the last image, and how many in a row came from it
        self._ahead = -1
        self._files: dict[int, BinaryIO] = {}
        self._owner = os.getpid()

    def _labels(self, labels: Tensor, setting: str) -> tuple[Sequence[int] | None, int | None]:
        missing = (labels < 0).nonzero().flatten()
        if len(missing) == len(labels):
            return None, None
        if len(missing):
            raise UserError(
                f"{setting}: {len(missing)} of {len(labels)} images have no .cls or .json label beside them, the first "
                f"is {self.ids[int(missing[0])]}: add theirs, or leave out all"
            )
        return numbers(labels), int(labels.max()) + 1

    def image(self, index: int) -> Image.Image:
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        content = self._read(bisect_right(self.firsts, index) - 1, offset, size)
        if len(content) != size:
            raise OSError(f"the shard ends {size - len(content)} bytes before the image does")
        return decode(io.BytesIO(content))

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if self._owner != os.getpid():
            # A fork shares its parent's positions in open files, but not its right to move them.
            self._files, self._owner = {}, os.getpid()
        last, row = self._row
        self._row = (number, row + 1 if number == last else 1)
        if self._one_by_one(number):
            self._asked[number] += 1
            return read_part(self.shards[number], offset, size)
        self._asked[number] = 0
        file = self._file(number)
        file.seek(offset)
        return file.read(size)

    def _one_by_one(self, number: int) -> bool:
        """Whether an image of a shard should be had without the shard."""
        shard = self.shards[number]
        if self.store is None or not shard.remote or not shard.parts or number in self._files:
            return False
        return self._asked[number] < (shard.size or 0) // ROUND_TRIP_BYTES and not self.store.holds(shard)

    def _file(self, number: int) -> BinaryIO:
        file = self._files.pop(number, None) or _open(self.shards[number], self.store)
        self._files[number] = file  # the last is the one used last
        if len(self._files) > OPEN:
            self._files.pop(next(iter(self._files))).close()
        if self._row[1] >= IN_A_ROW and self._ahead != number + 1:
            self._ahead = number + 1
            self._prefetch(self._ahead)
        return file

    def _prefetch(self, number: int) -> None:
        """Downloads a shard while the one before it is being read."""
        if self.store is not None and number < len(self.shards) and self.shards[number].remote:
            threading.Thread(target=_quietly, args=(self.shards[number], self.store), daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _open(shard: File, store: Store | None) -> BinaryIO:
    return store.open(shard) if store is not None and shard.remote else open(shard.place, "rb")


def _quietly(shard: File, store: Store) -> None:
    # What is wrong with the shard is said when its images are wanted.
    with suppress(UserError, OSError):
        store.open(shard).close()


def _key_of(shard: File) -> str:
    place = shard.place if shard.remote else os.path.abspath(shard.place)
    return key_of(version=INDEX_VERSION, shard=place, size=shard.size, changed=shard.version,
                  suffixes=" ".join(suffixes()))  # fmt: skip


def _kept_index(shard: File, cache: Cache | None) -> Index | None:
    return None if cache is None else cache.load("listings", _key_of(shard))


def _made_index(shard: File, store: Store | None, cache: Cache | None) -> Index:
    """Where a shard's images are, by a pass over its headers that no other process repeats."""
    with nullcontext() if cache is None else cache.lock("listings", _key_of(shard)):
        entry = _kept_index(shard, cache)
        if entry is not None:
            return entry
        try:
            with _open(shard, store) as file:
                entry = read_index(file, str(shard))
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{shard} cannot be read as an uncompressed tar file ({error}): replace it, or leave it out"
            ) from None
        if cache is not None:
            cache.save("listings", _key_of(shard), *entry)
        return entry


def read_index(file: BinaryIO, name: str) -> Index:
    """Find the images of a shard by one pass over its headers.

    Args:
        file: the shard, seekable.
        name: of the shard, for messages.

    Returns:
        ``names`` and ``ends`` (see :class:`Names`), ``offsets`` and ``sizes`` in bytes and ``labels`` (-1 without one),
        (images,) int64 but for ``names``; ``cut``, why the shard seems to end early (or nothing), a ``digest``, and
        ``left_out``, as JSON: how many members are hidden, or by their ending, belong to no image.

    Raises:
        tarfile.TarError: where it does not begin as an uncompressed tar file.
        UserError: where a label is no class index.
    """
    names, cut = bytearray(), ""
    columns = {column: array("q") for column in ("ends", "offsets", "sizes", "labels")}

    endings, left_out, others = frozenset(suffixes()), Counter[str](), Counter[str]()

    def keep(image: tarfile.TarInfo | None, label: int) -> None:
        if image is None:
            left_out.update(others)
        else:
            names.extend(os.fsencode(image.name))
            for column, value in zip(columns, (len(names), image.offset_data, image.size, label), strict=True):
                columns[column].append(value)

    key, image, label = "", None, -1
    members = _members(file)
    try:
        for member in members:
            if any(map(is_hidden, member.name.split("/"))):
                left_out["hidden"] += 1
                continue
            if not member.isreg() or member.issparse():
                left_out[NO_FILE] += 1
                continue
            stem, ending = _key(member.name)
            if stem != key:
                keep(image, label)
                key, image, label = stem, None, -1
                others.clear()
            if f".{ending}" in endings:
                image = image or member
            elif ending == "cls" or (ending == "json" and label < 0):
                label = _label(file, member, name)
            elif ending != "json":
                others[f".{ending}" if ending else NO_SUFFIX] += 1
    except tarfile.TarError as error:
        if image is None and not names:
            raise
        cut = f"it ends early ({error}): what followed {member.name} is missing"
    if not cut or label >= 0 or max(columns["labels"], default=-1) < 0:
        keep(image, label)
    tensors = {"names": tensor_of(names)} | {column: tensor_of(values) for column, values in columns.items()}
    digest = hashlib.sha256(names)
    for values in columns.values():
        digest.update(values)
    return tensors, {"cut": cut, "digest": digest.hexdigest(), "left_out": json.dumps(left_out)}


def _key(name: str) -> tuple[str, str]:
    """A member's key, and its ending in lower case, which begins at the first dot of the name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files, links and devices in a tar file, by its headers alone.

    Raises:
        tarfile.ReadError: where it ends, and not as tar files do.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            end = 0
            while (member := shard.next()) is not None:
                shard.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0 or member.offset < end:
                    raise tarfile.ReadError("headers overlap")
                end = member.offset_data + member.size
                if end > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isdir():
                    yield member
            file.seek(shard.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except _UNFORESEEN as error:
        raise tarfile.ReadError(str(error)) from error


def _label(file: BinaryIO, member: tarfile.TarInfo, shard: str) -> int:
    """The class index in a ``.cls`` or ``.json``; -1 for a JSON object without one."""
    file.seek(member.offset_data)
    content = file.read(min(member.size, LABEL_BYTES))
    value: Any = content[:40]
    with suppress(ValueError, RecursionError):
        value = json.loads(content) if member.name.lower().endswith(".json") else int(content)
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
        if value is None:
            return -1
    if type(value) is not int or not 0 <= value < 2**31:
        raise UserError(
            f"{shard}: {member.name} has {value!r} for a class index: give a whole number from 0, as text in a .cls "
            "file or as label or cls in a .json file"
        )
    return value


def _places(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list | tuple) and bool(value) and all(map(is_text, value)))


RULES = (
    Rule("data.root", _places, "give paths or URLs of tar files"),
    Rule("data.validation_root", _places, "give paths or URLs of tar files, or null to draw validation images from "
         "data.root", nullable=True),
    whole_number("data.classes", 1, nullable=True),
    Rule("data.shards_kept", lambda count: is_whole(count) and count >= 1, "give at least 1, better 4",
         problem="leaves no room to read"),
)  # fmt: skip


class Shards(Source):
    """Tar shards of WebDataset's layout.

    Args:
        root: a folder of ``.tar`` files, a file, a glob, a pattern such as ``train-{000..146}.tar``, or a list of
            these; paths or URLs.
        validation_root: shards of validation images; None draws them from ``root``.
        classes: number of classes; None for one more than the largest label.
        shards_kept: number of remote shards on the local disk at most, in a temporary folder.
        size: side of the input for models that bring no transform of their own.

    Raises:
        UserError: where one of these is not possible.
    """

    def __init__(
        self,
        *,
        root: str | Sequence[str],
        validation_root: str | Sequence[str] | None,
        classes: int | None,
        shards_kept: int,
        size: int,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_arguments(
            RULES, root=root, validation_root=validation_root, classes=classes, shards_kept=shards_kept
        )  # fmt: skip
        check_arguments(FILES, size=size)
        self.root, self.validation_root, self.classes = root, validation_root, classes
        self.shards_kept, self.size = shards_kept, size

    def pools(self) -> tuple[Pool, Pool | None]:
        roots = {"data.root": self.root, "data.validation_root": self.validation_root}
        shards = {
            setting: describe(find(root, ".tar", setting), setting)
            for setting, root in roots.items()
            if root is not None
        }
        every = [shard for part in shards.values() for shard in part]
        store = Store(self.shards_kept) if any(shard.remote for shard in every) else None
        shared = posixpath.commonprefix([plain(shard.place) for shard in every]).rpartition("/")
        before = len(shared[0] + shared[1])
        pools = [
            ShardPool(part, [plain(shard.place)[before:] for shard in part], store, self.cache)
            for part in shards.values()
        ]
        found = max((pool.classes or 0 for pool in pools), default=0)
        if self.classes is not None and found > self.classes:
            raise UserError(
                f"data.classes={self.classes} is too few for the label {found - 1}: give at least {found}, or null"
            )
        for pool in pools:
            if pool.labels is not None:
                pool.classes = self.classes or found
        return pools[0], pools[1] if len(pools) > 1 else None

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)
