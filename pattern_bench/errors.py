"""The error that a user can mend, and how wrong values and unknown names are worded in its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

MOST_SHOWN = 100
"""Characters of a wrong value in a message."""


class UserError(ValueError):
    """A bad input. The message names the setting, its value and the remedy; commands show it without a traceback.

    >>> raise UserError("patch=0 is not possible: give a whole number of at least 1")
    Traceback (most recent call last):
    pattern_bench.errors.UserError: patch=0 is not possible: give a whole number of at least 1
    """


def told(value: Any, quoted: bool = True) -> str:
    """Return a wrong value as messages show it, in one line: numbers as they are, the beginning of text, and all else
    by its type.

    Args:
        value: what a user gave.
        quoted: whether text stands in quotation marks.

    >>> told(3), told("nine"), told([1, 2])
    ('3', "'nine'", 'a list')
    >>> told(2**70), told(2**7000)
    ('1180591620717411303424', 'an int')
    """
    if isinstance(value, str):
        shown = repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…")
        return shown if quoted else shown[1:-1]
    plain = (
        value is None
        or isinstance(value, bool | float | complex)
        or (isinstance(value, int) and value.bit_length() < 3 * MOST_SHOWN)
    )
    kind = type(value).__name__
    return repr(value) if plain else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """Return a hint for an unknown ``name``: the closest of ``choices``, or the first ``most`` of them.

    >>> did_you_mean("conv", ["conv1", "fc"]), did_you_mean("relu", ["conv1", "fc"])
    ('did you mean conv1?', 'choose from: conv1, fc')
    """
    every = list(choices)
    close = difflib.get_close_matches(name, every, n=3)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
    return f"choose from: {shown}"
