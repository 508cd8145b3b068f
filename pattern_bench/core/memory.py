"""Attempts that the device's memory may turn out too small for."""

from __future__ import annotations

from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor found no room: on a GPU, or in the computer's own memory, where torch says it with an error of
    no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def fits(attempt: Callable[[], object]) -> bool:
    """Makes an attempt, and says whether the memory was large enough for it.

    What one that failed had allocated is free afterwards: its traceback, which holds the tensors, ends in here.
    """
    try:
        attempt()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
