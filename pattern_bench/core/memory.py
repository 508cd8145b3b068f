"""Attempts that may need more memory than the device has left, and how to tell that this is why they failed."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

_NO_ROOM = re.compile(
    r"out of memory|(can't|can ?not|unable to|failed to) allocate|not enough memory|bad_alloc|bad allocation"
    r"|_ALLOC_FAILED|_ALLOCATION_FAILED|invalid buffer size",
    re.IGNORECASE,
)
"""How torch words a lack of memory where it raises no error type of its own: the allocators of the CPU and of MPS
(which calls a tensor larger than any that fits an invalid buffer), CUDA's own calls and NCCL's, and the status of
cuBLAS, cuDNN, cuSOLVER, cuSPARSE and cuFFT. Their other failures have other causes."""


class HalfDoneError(MemoryError):
    """Memory ran out where part of the work was done already, so that another attempt would do that part twice.

    >>> fits(lambda: 1)
    True
    >>> def half_done():
    ...     raise HalfDoneError("half of the sums are added")
    >>> fits(half_done)
    Traceback (most recent call last):
    pattern_bench.core.memory.HalfDoneError: half of the sums are added
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("wrong shape"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_ROOM.search(str(error)) is not None
    )


def fits(attempt: Callable[[], object]) -> bool:
    """Call ``attempt``, and return whether the memory was large enough for it; its result is not kept.

    What a failed attempt had allocated is free afterwards, since the traceback that holds its tensors ends here.

    Raises:
        HalfDoneError: where the attempt raises it; and every error that is not for want of memory.

    >>> def too_large():
    ...     raise MemoryError
    >>> fits(lambda: [0] * 10), fits(too_large)
    (True, False)
    """
    try:
        attempt()
        return True
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, HalfDoneError) or not is_out_of_memory(error):
            raise
        return False
