"""A folder of results belongs to one job at a time, on whichever machine: others are refused before they write to it.

The job holds the kernel's lock on a file in the folder, which ends with the job. Not every file system locks across
machines, so the file also says who holds it, and is written anew every few seconds for as long as that job lives.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pattern_bench.errors import UserError
from pattern_bench.processes import signals
from pattern_bench.storage import kernel_lock

log = logging.getLogger(__name__)
FILE = ".lock"
BEAT = 5.0
"""Seconds from one sign of life to the next."""
LOST = 30.0
"""Seconds without a sign of life after which a job on another machine is taken to be gone. They are waited, since the
clocks of two machines may differ."""

_held: dict[Path, int] = {}
"""This process's lock files with their open descriptors. A lock is the process's, so that a fork has to give it up."""


@contextlib.contextmanager
def claimed(folder: Path, setting: str) -> Iterator[None]:
    """Within, the folder is this process's, and another that wants it gets an error. May be nested.

    Args:
        folder: made where it is missing.
        setting: that names it, for the message.

    Raises:
        UserError: where another running job has it.
        OSError: where it cannot be written.
    """
    file = folder.absolute() / FILE
    if file in _held:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(file, setting)
    _held[file] = descriptor
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(file, descriptor, over), daemon=True)
    beats.start()
    let_go = functools.partial(_let_go, file, descriptor)
    signals.last_acts.add(let_go)
    try:
        yield
    finally:
        over.set()
        beats.join()
        signals.last_acts.discard(let_go)
        let_go()
        os.close(descriptor)


def _let_go(file: Path, descriptor: int) -> None:
    _held.pop(file, None)
    with contextlib.suppress(OSError):
        if _is_at(descriptor, file):
            file.unlink()


def _forget() -> None:
    """Give up the locks in a fork, such as a loader's worker, which may outlive the job by seconds."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _take(file: Path, setting: str) -> int:
    """An open descriptor of the file, which is then this job's."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            locked = kernel_lock.lock(descriptor)
            said = _content(file)
            if not _is_at(descriptor, file):  # let go of in between
                continue
            holder = _holder(said)
            if (said or locked is False) and _lives(file, said, holder, locked):
                raise UserError(
                    f"{setting}={file.parent} belongs to a job that is running ({_who(holder)}): wait for its end, or "
                    "choose another folder"
                )
            if said:
                log.warning("%s: taken over from a job that is gone (%s)", file.parent, _who(holder))
            if locked is False or (locked is None and said):  # a lock that nobody will let go of; the next file is new
                file.unlink(missing_ok=True)
                continue
            _say(descriptor, 0)
            kept, descriptor = descriptor, -1
            return kept
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _lives(file: Path, said: bytes, holder: dict[str, Any], locked: bool | None) -> bool:
    here = _here()
    if holder.get("boot") == here["boot"]:
        if locked is not None:  # on one machine the kernel knows
            return not locked
        if holder.get("processes") == here["processes"]:
            return _started(holder.get("pid")) == holder.get("started")
    log.warning("%s: looking for %.0f seconds whether a job lives (%s)", file.parent, LOST, _who(holder))
    end = time.monotonic() + LOST
    while time.monotonic() < end:
        time.sleep(min(1.0, LOST / 10))
        now = _content(file)
        if not now:  # it has just let go, or its machine's file is gone
            return False
        if now != said:
            return True
    return False


def _beat(file: Path, descriptor: int, over: threading.Event) -> None:
    """Give signs of life; end the job where another has taken over its folder."""
    number = 0
    while not over.wait(BEAT):
        number += 1
        try:
            if not _is_at(descriptor, file):
                log.error("%s was taken over by another job: this one ends", file.parent)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            _say(descriptor, number)
        except FileNotFoundError:  # somebody removed the folder
            return
        except OSError:
            continue


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        at_path = os.stat(file, follow_symlinks=False)
    except FileNotFoundError:
        if _held.get(file) == descriptor:
            raise
        return False
    return os.path.samestat(os.fstat(descriptor), at_path)


def _say(descriptor: int, number: int) -> None:
    """Write who holds the file, and the number of this sign of life, in as many bytes each time."""
    content = json.dumps({**_here(), "sign": f"{number:012d}"}).encode()
    with contextlib.suppress(OSError):  # without room for it, the kernel's lock is all there is
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))


def _content(file: Path) -> bytes:
    """Opened anew, so that a network's file system asks its server."""
    try:
        with open(file, "rb") as opened:
            return opened.read(4096)
    except OSError:
        return b""


def _holder(said: bytes) -> dict[str, Any]:
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    pid, host = (str(holder.get(key, "?"))[:80] for key in ("pid", "host"))
    return f"process {pid} on {host}" if holder else "it does not say which"


def _here() -> dict[str, Any]:
    """This process, in words that no other has: not another of the same number, nor one before the machine's start."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": kernel_lock.boot() or socket.gethostname(),
        "started": _started(os.getpid()),
        "processes": _names_of_processes(),
    }


def _names_of_processes() -> str:
    """The space that process numbers belong to; containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: object) -> str:
    """When a process was started, in the kernel's ticks; nothing where there is none."""
    told = kernel_lock.first_line(f"/proc/{pid}/stat") if type(pid) is int else ""
    return (told.rpartition(")")[2].split() + [""] * 20)[19]
