"""SIGTERM, SIGINT and SIGUSR1 end a command within seconds, whatever it is at. Imports no torch.

The handler raises :class:`Stopped` in the main thread. Python runs it between two operations of its own only, so a long
one in C holds it up, and what it raises can be lost in a finaliser. Therefore a thread, which the kernel tells of the
signal at once, ends the process where it is still there ``SECONDS`` later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

OBEYED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS = 4.5
"""From a signal to the end of the process."""
SECONDS_LAUNCHED = 3.0
"""The same of a process that another one started, which waits for it within its own seconds."""
SECONDS_WITH_NOTHING_TO_KEEP = 1.5
"""Of such a process outside of a loop that keeps its state, such as one that waits for another in an exchange."""
SECONDS_FOR_A_BATCH = 2.0
"""For a loop to come to the end of a batch, where its sums are whole and can be kept."""

Tell = Callable[[int], None]
last_acts: set[Callable[[], None]] = set()
"""Called however the process ends, such as to remove a temporary folder."""
# A signal handler is the process's, and reaches nothing but module variables.
_number = 0
"""The signal that asked for the end; 0 for none."""
_looking = 0
"""Loops that look for a signal themselves, one within another."""
_active = False
"""Whether the handlers are installed."""


class Stopped(SystemExit):
    """A signal asked for the end; the exit code is the one that shells know, 128 + ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def obeys(number: int) -> bool:
    """Whether this process ends by this module at the signal of that number."""
    return _active and number in OBEYED


def asked() -> bool:
    """Whether a signal has come. The caller then has the rest of the seconds to keep its state before :func:`obey`."""
    if _number:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _number != 0


def obey() -> None:
    """Do nothing, unless a signal has come.

    Raises:
        Stopped: where one has.
    """
    if _number:
        raise Stopped(_number)


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Within, a loop calls :func:`asked` after every batch, and is not interrupted within one, as long as a batch ends
    within ``SECONDS_FOR_A_BATCH``.

    Raises:
        Stopped: at the end of the block, where a signal has come.
    """
    global _looking
    _looking += 1
    try:
        yield
    finally:
        _looking -= 1
    obey()


@contextlib.contextmanager
def obeyed(tell: Tell, launched: bool = False) -> Iterator[None]:
    """Within, the signals of ``OBEYED`` end this process. Outside of the main thread nothing changes.

    Args:
        tell: says, once, how to go on after the signal of this number.
        launched: whether another process started this one, waits for it, and passes signals on that may have come
            here before; otherwise a second one ends it at once.

    Raises:
        Stopped: after a signal, whatever else it brought about.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _handle) for number in (*OBEYED, signal.SIGALRM)}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    tell = _once(tell)
    threading.Thread(target=_watch, args=(reader, tell, launched), daemon=True).start()
    _active = True
    try:
        yield
    except BaseException:
        if not _number:
            raise
    finally:
        if not _number:
            _active = False
            signal.set_wakeup_fd(previous)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)
    # The thread goes on to watch this process end.
    if _number:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell(_number)
        raise Stopped(_number)


def _handle(number: int, _: object) -> None:
    global _number
    first, _number = not _number, _number or number
    if first and _looking:
        signal.setitimer(signal.ITIMER_REAL, SECONDS_FOR_A_BATCH)
    elif first or (number == signal.SIGALRM and _looking):
        raise Stopped(_number)


def _watch(reader: int, tell: Tell, launched: bool) -> None:
    """Wait for a signal, and end the process if it has not ended by itself in time; at a second signal, at once."""
    first, deadline = 0, None
    while True:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not poll.poll(None if left is None else 1000 * left):
            _end(first, tell)
        come = os.read(reader, 64)
        if not come:
            os.close(reader)
            return
        for number in (number for number in come if number in OBEYED):
            if deadline is None:
                of_launched = SECONDS_LAUNCHED if _looking else SECONDS_WITH_NOTHING_TO_KEEP
                first, deadline = number, time.monotonic() + (of_launched if launched else SECONDS)
            elif not launched:
                _end(first, tell)


def _end(number: int, tell: Tell) -> NoReturn:
    tell(number)
    end_at_once(128 + number)


def end_at_once(code: int) -> NoReturn:
    """End this process, which may be in the midst of anything, and those that it started.

    Args:
        code: the exit code.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    for child in multiprocessing.active_children():
        child.kill()
    for act in list(last_acts):
        with contextlib.suppress(Exception):
            act()
    os._exit(code)


def _once(tell: Tell) -> Tell:
    lock = threading.Lock()

    def told(number: int) -> None:
        if lock.acquire(blocking=False):
            tell(number)

    return told


def _in_child() -> None:
    """A forked process, such as a loader's, leaves signals to the one that it came from."""
    if _active:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)
