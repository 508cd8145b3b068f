"""The one exception that is a user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

MOST_SHOWN = 100
"""Characters of a wrong value in a message."""


class UserError(ValueError):
    """A bad input. The message names the setting, its value and the remedy; it is shown without a traceback."""


def told(value: Any, quoted: bool = True) -> str:
    """A wrong value as errors show it: numbers and the beginning of text, in one line; all else by its type."""
    if isinstance(value, str):
        shown = repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…")
        return shown if quoted else shown[1:-1]
    plain = (
        value is None or isinstance(value, bool | float | complex) or (isinstance(value, int) and abs(value) < 2**64)
    )
    return repr(value) if plain else f"a {type(value).__name__}"


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """A hint for an unknown ``name``: the closest of ``choices``, or the first ``most`` of them."""
    every = list(choices)
    close = difflib.get_close_matches(name, every, n=3)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
    return f"choose from: {shown}"
