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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from pattern_bench.files import Damaged, read_tensors, write_tensors

log = logging.getLogger(__name__)


def key_of(**parts: Any) -> str:
    """A hash of named values; the same for the same values, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


VERSION = 1
"""Of what entries look like; those of another are computed again."""


class Cache:
    """Entries of a ``kind``, each a safetensors file below ``folder``. Where the folder cannot be written, the cache
    only reads; where it cannot be locked, jobs side by side may compute the same. It says so once."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writable = os.access(self.folder, os.W_OK)
        except OSError:
            self.writable = False
        self.full = self.unlockable = False
        if not self.writable:
            log.warning("cache.dir=%s cannot be written: nothing will be reused by later runs", self.folder)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """One job at a time for this entry. The lock is the kernel's: it ends with the job that holds it, however
        that ends, and the file that it leaves means nothing."""
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
        """What ``read`` makes of the entry's tensors, and its metadata; None where there is no entry, or one that is
        damaged, of another version, or that ``read`` refuses with a ValueError."""
        path = self._path(kind, key)
        try:
            tensors, metadata = read_tensors(path)
            entry, expected = metadata.pop("entry", "nothing"), _name(kind, key)
            if entry != expected:
                raise Damaged(f"it holds {entry} instead of {expected}")
            return read(tensors), metadata
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("cache entry %s is damaged or of another version (%s): computing it again", path, error)
            return None

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        """Stores an entry, in the place of any that was there, and says whether it did. A disk that is full costs the
        entry, not the job."""
        if not self.writable:
            return False
        path = self._path(kind, key)
        try:
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors, {**metadata, "entry": _name(kind, key)})
            return True
        except OSError as error:
            if not self.full:
                log.warning("cache entry %s cannot be written (%s): going on without it", path, error.strerror)
            self.full = True
            return False


def _name(kind: str, key: str) -> str:
    """As an entry knows itself, wherever its file may have been copied."""
    return f"{kind}/{key} of version {VERSION}"
