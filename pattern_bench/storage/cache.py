"""A content-addressed store of tensors, shared by runs, sweeps and jobs side by side: trained weights, moments, and
random orders' curves.

An entry's name is a hash of everything it depends on, so an entry is never out of date: no clock has a say. Files are
written under another name and moved into place, so a reader never sees half of one, and carry a checksum, so that one
that was damaged counts as missing; a lock lets one job compute while the others wait for its result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from pattern_bench.storage.cache_entries import User, entries, remove
from pattern_bench.storage.tensor_files import Damaged, read_tensors, write_tensors

log = logging.getLogger(__name__)


def key_of(**parts: Any) -> str:
    """Return a hash of named values, 32 hexadecimal digits; the same for the same values, whatever their order.

    >>> key_of(seed=0, layer="features.0") == key_of(layer="features.0", seed=0)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


VERSION = 1
"""Of the form of entries; those of another version are computed again."""


class Cache:
    """Entries of several kinds, each a safetensors file below a folder, ``KIND/KEY.safetensors``.

    Where the folder cannot be written, the cache only reads; where it cannot be locked, jobs side by side may compute
    the same. The log says so once.

    Args:
        folder: of the entries; made where it is missing.
        gib: as many GiB are kept at most: where more comes, what was used longest ago goes, but nothing that a running
            job uses. None for no bound.

    Attributes:
        writable: whether entries can be saved.
    """

    def __init__(self, folder: str, gib: float | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writable = os.access(self.folder, os.W_OK)
        except OSError:
            self.writable = False
        self.full = self.unlockable = self.said_bound = False
        self.gib = gib
        self.user = User(self.folder)
        if not self.writable:
            log.warning("cache.dir=%s cannot be written: nothing will be reused by later runs", self.folder)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Within, this job alone works on an entry; others that want it wait.

        The lock is the kernel's: it ends with the job that holds it, however that ends, and the file that it leaves
        means nothing.
        """
        with ExitStack() as held:
            if self.writable and not self.unlockable:
                path = self.folder / kind / f"{key}.lock"
                try:
                    path.parent.mkdir(exist_ok=True)
                    # A lock by the file's mere existence would outlive a job that is killed on another machine.
                    held.enter_context(FileLock(path, fallback_to_soft=False))
                except (OSError, NotImplementedError) as error:
                    self.unlockable = True
                    log.warning(
                        "cache.dir=%s cannot be locked (%s): jobs side by side may compute the same", self.folder, error
                    )
            yield

    def load(
        self, kind: str, key: str, read: Callable[[dict[str, Tensor]], Any] = dict
    ) -> tuple[Any, dict[str, str]] | None:
        """Return an entry, and its metadata; None where there is none, or one that is damaged or of another version.

        Args:
            kind: of the entry.
            key: of the entry, see :func:`key_of`.
            read: makes the entry of its tensors by name; a ValueError of its refuses them.
        """
        path = self._path(kind, key)
        if self.writable:
            self.user.uses(kind, key)
        try:
            tensors, metadata = read_tensors(path)
            entry, expected = metadata.pop("entry", "nothing"), _name(kind, key)
            if entry != expected:
                raise Damaged(f"it holds {entry} instead of {expected}")
            made = read(tensors)
            with suppress(OSError):
                os.utime(path)  # what was used longest ago goes first
            return made, metadata
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("cache entry %s is damaged or of another version (%s): computing it again", path, error)
            return None

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        """Store an entry, in the place of any that was there, and return whether it did. A full disk costs the entry,
        not the job.

        Args:
            kind: of the entry.
            key: of the entry, see :func:`key_of`.
            tensors: its content by name.
            metadata: what is known of it, as text.
        """
        if not self.writable:
            return False
        path = self._path(kind, key)
        self.user.uses(kind, key)
        try:
            path.parent.mkdir(exist_ok=True)
            self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
            write_tensors(path, tensors, {**metadata, "entry": _name(kind, key)})
            return True
        except OSError as error:
            if not self.full:
                log.warning("cache entry %s cannot be written (%s): going on without it", path, error.strerror)
            self.full = True
            return False

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago, until an entry of ``size`` bytes fits below the bound."""
        if self.gib is None:
            return
        bound = round(self.gib * 2**30)
        left = sorted(entries(self.folder), key=lambda entry: entry.used)
        over = sum(entry.size for entry in left) + size - bound
        if over <= 0:
            return
        gone = freed = 0
        while left and freed < over:
            some = [left.pop(0)]
            while left and freed + sum(entry.size for entry in some) < over:
                some.append(left.pop(0))
            try:
                removed = remove(self.folder, some)
            except (OSError, NotImplementedError) as error:
                self._say_bound(f"but entries cannot be removed ({error})")
                return
            gone, freed = gone + len(removed), freed + sum(entry.size for entry in removed)
        kept = "running jobs need more, which is kept for them"
        self._say_bound(kept if freed < over else f"removed {gone} entries, used longest ago, and so on")

    def _say_bound(self, what: str) -> None:
        if not self.said_bound:
            log.warning("cache.gib=%g is met: %s", self.gib, what)
        self.said_bound = True


def _name(kind: str, key: str) -> str:
    """The name that an entry carries in its file, which may have been copied elsewhere."""
    return f"{kind}/{key} of version {VERSION}"
