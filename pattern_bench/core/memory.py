"""Attempts that the device's memory may turn out too small for."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

_NO_ROOM = re.compile(
    r"out of memory|(can't|can ?not|unable to|failed to) allocate|not enough memory|bad_alloc|bad allocation"
    r"|_ALLOC_FAILED|_ALLOCATION_FAILED|invalid buffer size",
    re.IGNORECASE,
)
"""How torch words it where it has no type for it: the allocators of the CPU and of MPS (which calls a tensor larger
than any that fits an invalid buffer), CUDA's own calls and NCCL's, and the status of cuBLAS, cuDNN, cuSOLVER, cuSPARSE
and cuFFT. Their other failures are no matter of memory."""


class SpentError(MemoryError):
    """Memory that ran out where something was half done, so that another attempt would do it twice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor found no room: on a GPU, or in the computer's own memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_ROOM.search(str(error)) is not None
    )


def fits(attempt: Callable[[], object]) -> bool:
    """Makes an attempt, and says whether the memory was large enough for it.

    What one that failed had allocated is free afterwards: its traceback, which holds the tensors, ends in here.
    """
    try:
        attempt()
        return True
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, SpentError) or not is_out_of_memory(error):
            raise
        return False
