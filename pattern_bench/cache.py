"""A content-addressed store of tensors: trained weights and moments, shared by runs, sweeps and jobs side by side.

An entry's name is a hash of everything it depends on, so an entry is never out of date. Files are written under
another name and moved into place, so a reader never sees half of one; a lock lets one job compute while the
others wait for its result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from filelock import FileLock
from torch import Tensor

from pattern_bench.files import read_tensors, write_tensors

log = logging.getLogger(__name__)


def key_of(**parts: Any) -> str:
    """A hash of named values; the same for the same values, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Cache:
    """Entries of a ``kind``, each a safetensors file below ``folder``. Where the folder cannot be written, the cache
    only reads, and says so once."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writable = os.access(self.folder, os.W_OK)
        except OSError:
            self.writable = False
        self.full = False
        if not self.writable:
            log.warning("cache.dir=%s cannot be written: nothing will be reused by later runs", self.folder)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """One job at a time for this entry."""
        if not self.writable:
            yield
            return
        path = self.folder / kind / f"{key}.lock"
        path.parent.mkdir(exist_ok=True)
        with FileLock(path):
            yield

    def load(self, kind: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The entry, or None where there is none that can be read."""
        path = self._path(kind, key)
        if not path.is_file():
            return None
        try:
            return read_tensors(path)
        except (safetensors.SafetensorError, OSError) as error:
            log.warning("cache entry %s is damaged (%s): computing it again", path, error)
            return None

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        """Stores an entry, and says whether it did. A disk that is full costs the entry, not the job."""
        if not self.writable:
            return False
        path = self._path(kind, key)
        try:
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors, metadata)
            return True
        except OSError as error:
            if not self.full:
                log.warning("cache entry %s cannot be written (%s): going on without it", path, error.strerror)
            self.full = True
            return False
