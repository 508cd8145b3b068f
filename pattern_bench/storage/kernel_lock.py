"""Locks of the kernel, which end with the process that holds them; and the identity of this machine."""

from __future__ import annotations

import errno
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int) -> bool | None:
    """Try to lock an open file, without waiting.

    Returns:
        Whether this process has the lock now; None where the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


def boot() -> str:
    """Return an identifier of this machine since its start; an empty text where the system has none."""
    return first_line("/proc/sys/kernel/random/boot_id")


def first_line(file: str) -> str:
    """Return the first line of a file; an empty text where it cannot be read."""
    try:
        return Path(file).read_text().partition("\n")[0]
    except OSError:
        return ""
