"""The entry of every command: errors of the user's are one line on standard error, with exit code 1."""

from __future__ import annotations

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
        message = user_message(error) if isinstance(error, UserError) else explain(error)
        if message is None:
            raise
        sys.exit(f"error: {message}" if tells() else 1)


def user_message(error: BaseException) -> str:
    """Return the message of a UserError, also where it arrived as the traceback of a loader's worker.

    >>> user_message(UserError("seed=x is not possible"))
    'seed=x is not possible'
    """
    return str(error).rpartition("errors.UserError: ")[2].strip()
