"""The entry of every command: errors of the user's are one line on standard error, with exit code 1; what a command has
to say goes to standard output, whole or with an error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from pattern_bench.errors import UserError
from pattern_bench.processes.launch import tells


def run_command(body: Callable[[], object], explain: Callable[[Exception], str | None] = lambda _: None) -> None:
    """Run a command.

    A :class:`UserError`, or what ``explain`` has a message for, ends it with ``error: MESSAGE`` and exit code 1; of the
    processes of a job, one writes the line. Anything else, a mistake of the program's, ends it with a traceback.

    Args:
        body: what the command does.
        explain: the message for an exception that is no UserError; None where there is none.

    Raises:
        SystemExit: with the message, or from ``body``.
    """
    try:
        body()
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and (refused := _refused_output()):
            error = refused
        message = user_message(error) if isinstance(error, UserError) else explain(error)
        if message is None:
            raise
        sys.exit(f"error: {message}" if tells() else 1)


def say(text: str, done: str = "") -> None:
    """Write lines to standard output, at once.

    Args:
        text: without the end of the last line.
        done: what is done all the same where it cannot be written, for the message.

    Raises:
        UserError: where standard output is full or closed.
    """
    try:
        if sys.stdout is None:  # closed before Python began
            raise OSError("it is closed")
        print(text, flush=True)
    except (OSError, ValueError) as error:
        raise _unwritable(error, done) from error


def _refused_output() -> UserError | None:
    """The error where what others wrote to standard output, such as Hydra, did not arrive there."""
    try:
        sys.stdout.write("\n")  # what failed is no longer in the buffer
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return _unwritable(error, "")
    return None


def _unwritable(error: Exception, done: str) -> UserError:
    # What is left in the buffer would fail once more, with a traceback, as Python ends.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    why = getattr(error, "strerror", None) or str(error)
    also = f"; {done}" if done else ""
    return UserError(f"standard output cannot be written ({why}): send it elsewhere{also}")


def user_message(error: BaseException) -> str:
    """Return the message of a UserError, also where it arrived as the traceback of a loader's worker.

    >>> user_message(UserError("seed=x is not possible"))
    'seed=x is not possible'
    """
    return str(error).rpartition("errors.UserError: ")[2].strip()
