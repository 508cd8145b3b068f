"""Files by path or URL: find them, describe them, read parts of them, keep a few of them on the local disk.

URLs go through fsspec, which Lightning depends on: ``https://`` with its aiohttp, ``s3://`` with s3fs and ``gs://``
with gcsfs where they are installed. Credentials come from where those look for them (environment, ``~/.netrc``), never
from a URL: configurations are logged.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from pattern_bench.data.image_files import is_hidden
from pattern_bench.errors import UserError
from pattern_bench.storage.atomic import write_file

T = TypeVar("T")

WAITS = (1.0, 4.0)
"""Seconds between the tries of a download."""
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_URL = re.compile(r"(\w+://)(?:[^/@\s'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?")
# fsspec's file systems that are made of another one, or of files that say where the rest is; some unpickle.
_WRAPPERS = frozenset(
    (
        "reference", "filecache", "simplecache", "blockcache", "cached", "dask", "dir", "generic", "zip", "tar",
        "libarchive", "git", "data", "asyncwrapper", "async_wrapper", "jupyter", "jlab", "memory",
    )
)  # fmt: skip
MOST_FILES = 1_000_000
"""Files that braces may stand for, at most."""
# The names by which file systems tell what changes with the content.
_VERSIONS = (
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "md5Hash",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
)


@dataclass(frozen=True)
class File:
    """A file by path or URL, looked up.

    Attributes:
        place: path or URL.
        setting: that names it, for messages.
        size: in bytes; None where the server does not say.
        version: changes when the content does, as far as the file system tells.
        parts: whether a part can be read without the rest.
    """

    place: str
    setting: str
    size: int | None
    version: str
    parts: bool

    @property
    def remote(self) -> bool:
        """Whether it lies on a server or in a store."""
        return _is_url(self.place)

    def __str__(self) -> str:
        return f"{self.setting}: {plain(self.place)}"


def plain(text: str) -> str:
    """Return a text without what may be secret in its URLs: credentials and queries.

    >>> plain("https://user:pass@example.org/a.tar?signature=secret")
    'https://example.org/a.tar'
    """
    return _URL.sub(r"\1\2", text)


def find(patterns: str | Sequence[str], ending: str, setting: str) -> list[str]:
    """Return the paths and URLs that patterns stand for.

    >>> find("a-{09..11}.tar", ".tar", "data.root")
    ['a-09.tar', 'a-10.tar', 'a-11.tar']

    Args:
        patterns: a file, a folder, a glob, braces as in ``a-{000..146}.tar`` or ``{a,b}.tar``, or a list of these.
        ending: of the files in a folder.
        setting: that has the patterns, for messages.

    Raises:
        UserError: where they stand for no file, for one file twice, or for what is neither a path nor a plain URL.
    """
    listed = [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]
    places = [place for pattern in listed for one in _braces(pattern) for place in _matches(one, ending, setting)]
    shown = plain(", ".join(listed))
    if not places:
        raise UserError(f"{setting}={shown} means no {ending} file: give a folder that holds some, a glob or a range")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise UserError(f"{setting}={shown} means {plain(twice)} twice: give each file once")
    return places


def _braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    if choices is None:
        width = len(first) if first.startswith("0") else 0
        if int(last) - int(first) > MOST_FILES:
            raise UserError(f"{plain(pattern)} means {int(last) - int(first) + 1} files: give {MOST_FILES} at most")
        values = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        values = choices.split(",")
    for value in values:
        yield from _braces(pattern[: match.start()] + value + pattern[match.end() :])


def _is_url(place: str) -> bool:
    return "://" in place


def _matches(place: str, ending: str, setting: str) -> list[str]:
    place = _local(place)
    if place.startswith("pipe:"):
        raise UserError(f"{setting}={plain(place)} would run a command: give a path or a URL instead")
    if not _is_url(place):
        path = Path(os.path.expanduser(place))  # Path's own raises where there is no such user
        if path.is_dir():
            return sorted(str(file) for file in path.glob(f"*{ending}") if not is_hidden(file.name))
    elif "::" in place or place.partition("://")[0].lower() in _WRAPPERS:
        raise UserError(
            f"{setting}={plain(place)} is a file system upon another: give the path of files on this machine, or the "
            "address of files on a server or in a store"
        )
    if not _is_url(place):
        return sorted(glob.glob(str(path))) if glob.has_magic(str(path)) and not path.exists() else [str(path)]
    address = urlsplit(place)
    if address.password or (address.username and place.startswith("http")):
        raise UserError(
            f"{setting}={plain(place)} has credentials in it, which would be logged: put them into ~/.netrc instead"
        )
    if address.path.endswith(ending) and not glob.has_magic(address.path):
        return [place]
    if not address.path.endswith(ending):
        place = f"{place.rstrip('/')}/*{ending}"
    files, pattern = _filesystem(place, setting)
    found = _attempt(lambda: files.glob(pattern), f"{setting}={plain(place)}")
    return sorted(str(files.unstrip_protocol(name)) for name in found)


def _local(place: str) -> str:
    """The path in a ``file:`` URL, written with one, two or three slashes, percent signs or none."""
    scheme, colon, rest = place.partition(":")
    if not colon or scheme.lower() not in ("file", "local") or not rest.startswith("/"):
        return place
    path = rest.removeprefix("//").removeprefix("localhost") if rest.startswith("//localhost/") else rest
    path = path.removeprefix("//") if path.startswith("//") else path
    return path if os.path.exists(path) else unquote(path)


def describe(places: Sequence[str], setting: str) -> list[File]:
    """Look files up, remote ones side by side.

    Args:
        places: paths and URLs.
        setting: that names them, for messages.

    Raises:
        UserError: naming the first that is missing.
    """
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda place: _describe(place, setting), places))


def _describe(place: str, setting: str) -> File:
    if not _is_url(place):
        try:
            stat = os.stat(place)
        except (OSError, ValueError) as error:  # the latter for a NUL in the name
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{setting}: {place} is not there ({why}): give the path of a file") from None
        return File(place, setting, stat.st_size, str(stat.st_mtime_ns), True)
    files, path = _filesystem(place, setting)
    info = _attempt(lambda: files.info(path), f"{setting}: {plain(place)}")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    parts = not place.startswith("http") or _serves_parts(files, path, info.get("size"))
    return File(place, setting, info.get("size"), version, parts)


def _serves_parts(files: Any, path: str, size: int | None) -> bool:
    if not size:
        return False
    try:
        with files.open(path, size=size, cache_type="none") as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except Exception:  # a server that ignores the range, or refuses it in a way of its own
        return False


def _filesystem(place: str, setting: str) -> tuple[Any, str]:
    """The file system of a URL, this process's own: fsspec's are not to be used after a fork."""
    options: dict[str, Any] = {}
    if place.startswith("http"):
        from aiohttp import ClientTimeout

        # A whole file may take long, as long as something arrives.
        timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    try:
        return url_to_fs(place, **options)
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"{setting}={plain(place)} cannot be opened: {plain(str(error))}") from None


def _attempt(read: Callable[[], T], what: str) -> T:
    """What ``read`` returns, tried a few times unless the answer is final.

    Raises:
        UserError: where it fails, without what is secret in the URL.
    """
    waits = iter(WAITS)
    while True:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # every file system has errors of its own
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            status = getattr(cause, "status", None)
            final = isinstance(cause, FileNotFoundError | PermissionError) or status in (400, 401, 403, 404, 410)
            wait = None if final else next(waits, None)
            if wait is None:
                reason = f"{status} {getattr(cause, 'message', '')}" if status else plain(str(cause))
                tries = "" if final else f" in {len(WAITS) + 1} tries"
                raise UserError(
                    f"{what} cannot be read{tries} ({type(cause).__name__}: {reason}): check the address, the "
                    "credentials and the network, then run again"
                ) from None
            time.sleep(wait)


def read_part(file: File, offset: int, size: int) -> bytes:
    """Read a part of a remote file.

    Args:
        file: of which the server serves parts.
        offset: of the part's first byte.
        size: in bytes; fewer are returned where the file ends.

    Raises:
        UserError: where the server does not answer.
    """

    def read() -> bytes:
        files, path = _filesystem(file.place, file.setting)
        return files.cat_file(path, start=offset, end=offset + size)

    return _attempt(read, str(file))


class Store:
    """A temporary folder with the remote files that were used last, which forked and spawned processes share.

    The process that made it removes the folder when the store is no longer used, at the latest when it ends.

    Args:
        kept: number of files in the folder, at most.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.folder = Path(tempfile.mkdtemp(prefix="pattern_bench-"))
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def _path(self, file: File) -> Path:
        return self.folder / f"{hashlib.sha256(file.place.encode()).hexdigest()[:32]}.file"

    def holds(self, file: File) -> bool:
        """Whether a file is in the folder."""
        return self._path(file).exists()

    def open(self, file: File) -> BinaryIO:
        """Open a file, which is downloaded unless the folder has it. It stays readable when it is removed to make room.

        Raises:
            UserError: where it cannot be downloaded.
        """
        path = self._path(file)
        with suppress(FileNotFoundError):
            return _used(path)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                self._make_room()
                self._download(file, path)
            return _used(path)

    def _make_room(self) -> None:
        def last_use(path: Path) -> int:
            with suppress(FileNotFoundError):
                return path.stat().st_mtime_ns
            return 0

        # A name that begins with a dot is a download of another process's.
        files = sorted(self.folder.glob("[!.]*.file"), key=last_use)
        for old in files[: max(0, len(files) - self.kept + 1)]:
            old.unlink(missing_ok=True)

    def _download(self, file: File, path: Path) -> None:
        def fetch(target: Path) -> None:
            files, remote = _filesystem(file.place, file.setting)
            files.get_file(remote, str(target))
            size = target.stat().st_size
            if file.size is not None and size != file.size:
                raise ConnectionError(f"cut short, {size} of {file.size} bytes")

        def whole() -> None:
            try:
                write_file(path, fetch)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"{self.folder.parent} has no room for {file} ({(file.size or 0) / 1e9:.1f} GB): "
                        "set TMPDIR to a folder on a larger disk, or lower data.shards_kept"
                    ) from None
                raise

        _attempt(whole, str(file))


def _used(path: Path) -> BinaryIO:
    handle = path.open("rb")
    with suppress(FileNotFoundError):
        os.utime(path)
    return handle


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
