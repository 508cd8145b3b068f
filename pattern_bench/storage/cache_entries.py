"""The files of a cache: listed, marked as in use by a running job, and removed.

A job that uses an entry says so first, in a file of its own that it has locked for as long as it lives; what is removed
is nobody's then. Links are not followed, and what the cache did not write is neither counted nor removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
from filelock import FileLock

from pattern_bench.storage import kernel_lock

KINDS = ("models", "moments", "baselines", "listings")
"""Trained weights; moments; random orders' curves; listings of folders and indices of shards."""
USERS = "in_use"
"""The folder of the files in which running jobs say what they use."""
FORGOTTEN = 7 * 86400.0
"""Seconds after which a job is taken to be gone that no lock can be seen of, since it runs elsewhere."""
_ENTRY = re.compile(r"([0-9a-f]{32})\.safetensors")
_LEFT = re.compile(r"[0-9a-f]{32}\.lock|\.[0-9a-f]{32}\.part\.safetensors")
"""What jobs leave beside entries: locks, and what one that was killed had begun to write."""


class Entry(NamedTuple):
    """An entry of a cache.

    Attributes:
        kind: one of ``KINDS``.
        key: 32 hexadecimal digits.
        size: in bytes.
        used: when it was last used, in seconds since 1970.
    """

    kind: str
    key: str
    size: int
    used: float


def entries(folder: Path, kinds: Iterable[str] = KINDS) -> Iterator[Entry]:
    """Yield the entries of a cache, in no order.

    Args:
        folder: of the cache.
        kinds: those of interest.
    """
    for kind in kinds:
        with _opened(folder / kind) as place:
            for found in os.scandir(place) if place is not None else ():
                key = _ENTRY.fullmatch(found.name)
                if key and found.is_file(follow_symlinks=False) and _is_own(folder / kind / found.name, kind, key[1]):
                    with contextlib.suppress(FileNotFoundError):
                        about = found.stat(follow_symlinks=False)
                        yield Entry(kind, key[1], about.st_size, about.st_mtime)


def remove(folder: Path, chosen: Iterable[Entry]) -> list[Entry]:
    """Remove those entries that no running job uses, and return them.

    Args:
        folder: of the cache.
        chosen: entries to remove.

    Raises:
        OSError: where the folder cannot be written.
    """
    gone = []
    with _registering(folder):
        used = in_use(folder)
        for entry in chosen:
            if (entry.kind, entry.key) in used:
                continue
            with _opened(folder / entry.kind) as place, contextlib.suppress(FileNotFoundError):
                if place is not None:
                    os.unlink(f"{entry.key}.safetensors", dir_fd=place)
                    gone.append(entry)
    return gone


def sweep_up(folder: Path, kinds: Iterable[str]) -> None:
    """Remove what jobs that are gone left beside the entries of some kinds: locks, and files that are half written."""
    for kind in kinds:
        with _opened(folder / kind) as place:
            for found in list(os.scandir(place)) if place is not None else []:
                if not _LEFT.fullmatch(found.name) or not found.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(OSError):
                    old = time.time() - found.stat(follow_symlinks=False).st_mtime > 86400
                    if old and _is_free(folder / kind / found.name):
                        os.unlink(found.name, dir_fd=place)


def in_use(folder: Path) -> set[tuple[str, str]]:
    """Return kinds and keys of the entries that running jobs use. The notes of jobs that are gone are removed."""
    used: set[tuple[str, str]] = set()
    with _opened(folder / USERS) as place:
        for found in list(os.scandir(place)) if place is not None else []:
            if not found.name.endswith(".keys") or not found.is_file(follow_symlinks=False):
                continue
            file = folder / USERS / found.name
            with contextlib.suppress(OSError):
                content = file.read_text()
                elsewhere = not content.startswith(f"{kernel_lock.boot() or 'unknown'}\n")
                recent = time.time() - found.stat(follow_symlinks=False).st_mtime < FORGOTTEN
                if not _is_free(file) or (elsewhere and recent):
                    used |= {(k, key) for k, _, key in (line.partition("/") for line in content.splitlines()[1:])}
                else:
                    file.unlink()
    return used


class User:
    """Marks the entries that this job uses, so that no other job removes them.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: set[tuple[str, str]] = set()
        self.file: int | None = None

    def uses(self, kind: str, key: str) -> None:
        """Mark an entry, before it is looked for. Where the mark cannot be written, the job goes on without it."""
        if (kind, key) in self.known:
            return
        self.known.add((kind, key))
        with contextlib.suppress(OSError, NotImplementedError), _registering(self.folder):
            if self.file is None:
                self.file = self._open()
            os.write(self.file, f"{kind}/{key}\n".encode())

    def _open(self) -> int:
        path = self.folder / USERS / f"{os.getpid()}-{secrets.token_hex(8)}.keys"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        kernel_lock.lock(file)
        os.write(file, f"{kernel_lock.boot() or 'unknown'}\n".encode())
        weakref.finalize(self, _end, file, path, os.getpid())
        return file


def _end(file: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a loader's worker, which is a copy of the job
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


@contextlib.contextmanager
def _registering(folder: Path) -> Iterator[None]:
    """Within, nobody else says what it uses, or removes anything."""
    users = folder / USERS
    users.mkdir(exist_ok=True)
    if users.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(users))
    with FileLock(users / "users.lock", fallback_to_soft=False):
        yield


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A folder itself, not what a link in its place leads to; None where there is none."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield place
    finally:
        os.close(place)


def _is_own(file: Path, kind: str, key: str) -> bool:
    """Whether the cache wrote this file, in this or an earlier version."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return str((opened.metadata() or {}).get("entry")).startswith(f"{kind}/{key} of version ")
    except Exception:  # damaged, or no safetensors file at all
        return False


def _is_free(file: Path) -> bool:
    """Whether nobody has locked the file, as far as can be seen from here."""
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return kernel_lock.lock(descriptor) is True
    finally:
        os.close(descriptor)
