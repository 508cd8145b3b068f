"""Batches that are taken in parts where the device's memory is too small for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch

from pattern_bench.core.memory import fits, is_out_of_memory
from pattern_bench.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within, memory that runs out where nothing can be taken in parts is one clear error.

    Raises:
        UserError: instead of torch's or Python's own.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({str(error).partition(chr(10))[0]}): select fewer layers (layer), or use a machine with "
            "more of it; what is computed so far is kept, and resume=DIR takes this run up again"
        ) from error


class MicroBatches:
    """Takes in images at once, until the device's memory turns out too small for that; then fewer, to the end."""

    most: int | None = None
    setting: ClassVar[str] = "data.batch_size"
    remedy: ClassVar[str] = "select fewer layers (layer)"
    """What helps where a single image is too much, besides another device."""

    def in_parts(self, images: int, take: Callable[[slice], object]) -> None:
        """Let ``take`` take in so many images, part by part: each wholly, or, where memory is too small, not at all.

        Raises:
            UserError: where memory is too small for a single image.
        """
        done = 0
        while done < images:
            part = slice(done, min(done + (self.most or images), images))
            if fits(partial(take, part)):
                done = part.stop
            else:
                self.halve(part.stop - part.start)

    def halve(self, images: int) -> None:
        """Take half of so many images at once from now on.

        Raises:
            UserError: where that was one image.
        """
        if images == 1:
            raise self.too_small()
        self.most = images // 2
        log.warning("out of memory with %d images at once: going on with %d (%s)", images, self.most, self.setting)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def too_small(self, what: str = "a single image") -> UserError:
        """The error that the memory is too small for ``what``, with the remedy."""
        return UserError(
            f"the device's memory is too small for {what}: {self.remedy}, or use a device with more of it (trainer=cpu)"
        )
