"""The states of unfinished stages, kept in the run's folder so that an interrupted run can be taken up again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
from torch import Tensor

from pattern_bench.processes import collectives
from pattern_bench.storage.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
SHARE = 0.03
"""The share of the time that goes into keeping states, at most."""
PARTIAL = "partial"
"""The folder of unfinished states, in the run's folder."""
GUESSED_RATE = 2e8
"""Bytes per second that a disk is taken to write before it has been timed."""


_full: set[Path] = set()
"""Folders that cannot be written, as the log has said; of this process, so that it says so once for all stages."""


def keep(path: Path, write: Callable[[], object]) -> bool:
    """Write a file of an unfinished stage, and return whether that worked.

    A full disk costs the file, not the job, and the log says so once for each folder.

    Args:
        path: of the file.
        write: writes it, whole or not at all.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write()
        return True
    except OSError as error:
        if path.parent not in _full:
            log.warning("%s cannot be written (%s): going on without it", path, error.strerror or error)
        _full.add(path.parent)
        return False


class StageState:
    """The state of one stage in one process, a file that is whole or missing.

    Args:
        folder: the run's.
        stage: names the file; each process has its own, and another number of processes looks for other files.
        key: a hash of everything that the state depends on; a state with another key is not taken up.
        seconds: from one state to the next, or longer where they would take more than ``SHARE`` of the time; 0 keeps
            every one.
    """

    def __init__(self, folder: Path, stage: str, key: str, seconds: float) -> None:
        self.path = folder / PARTIAL / f"{stage}-{collectives.rank()}-of-{collectives.world_size()}.safetensors"
        self.key, self.seconds = key, seconds
        self.cost: float | None = None
        self.last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], int] | None:
        """Return the state, and how many images are in it; None where there is none to go on from."""
        try:
            tensors, metadata = read_tensors(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            log.warning("%s is damaged (%s): this stage begins again", self.path, error)
            return None
        return (tensors, int(metadata["images"])) if metadata.get("key") == self.key else None

    def save_now_and_then(self, state: Callable[[], Mapping[str, Tensor]], images: int) -> None:
        """Keep the state, where enough time has passed since the last one.

        Args:
            state: makes it, tensors by name.
            images: how many are in it.
        """
        waited = time.monotonic() - self.last
        if waited < self.seconds:
            return
        tensors = state()
        if self.cost is None:
            self.cost = sum(tensor.nbytes for tensor in tensors.values()) / GUESSED_RATE
        if self.seconds and waited < self.cost / SHARE:
            return
        self.save(tensors, images)

    def save(self, state: Mapping[str, Tensor], images: int) -> None:
        """Keep the state, see :func:`keep`.

        Args:
            state: tensors by name.
            images: how many are in it.
        """
        start = time.monotonic()
        metadata = {"key": self.key, "images": str(images)}
        if not keep(self.path, lambda: write_tensors(self.path, state, metadata)):
            self.seconds = float("inf")
        self.last = time.monotonic()
        self.cost = self.last - start

    def remove(self) -> None:
        """Remove the state of a stage that is finished."""
        self.path.unlink(missing_ok=True)
