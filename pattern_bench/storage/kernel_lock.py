"""This machine, and the locks of its kernel: they end with the process that holds them."""

from __future__ import annotations

import errno
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int) -> bool | None:
    """Whether the lock of an open file is now this process's; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


def boot() -> str:
    """This machine since its start; nothing where the system does not say."""
    return first_line("/proc/sys/kernel/random/boot_id")


def first_line(file: str) -> str:
    """Nothing where the file cannot be read."""
    try:
        return Path(file).read_text().partition("\n")[0]
    except OSError:
        return ""
