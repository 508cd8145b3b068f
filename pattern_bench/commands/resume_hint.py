"""The line that says how to go on with a command that a signal ended. A callback of Hydra's names the folder."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pattern_bench.processes.launch import number_from_outside, tells


class Begun:
    """The folder of the run or the sweep that this command has begun, for the line that says how to go on."""

    def __init__(self) -> None:
        self._folder, self._sweep = "", False

    def run(self, folder: str) -> None:
        """Note the folder of a run; within a sweep, the sweep's is the one to go on with."""
        if not self._sweep:
            self._folder = folder

    def sweep(self, folder: str) -> None:
        """Note the folder of a sweep."""
        self._folder, self._sweep = folder, True

    def tell(self, number: int, module: str, given: list[str]) -> None:
        """Write the line to standard error, once for all processes of a job.

        Args:
            number: of the signal.
            module: of the command, as in ``python -m MODULE``.
            given: its arguments.
        """
        outside = number_from_outside()
        if (outside is None or outside[0] == 0) and tells():
            # Not by way of sys.stderr: the main thread may hold its lock.
            what = how_to_go_on(module, given, self._folder, self._sweep)
            os.write(2, f"stopped by {signal.Signals(number).name}: {what}\n".encode())


_BEGUN: ContextVar[Begun] = ContextVar("begun")


@contextmanager
def noted() -> Iterator[Begun]:
    """Within, :class:`Folder` notes the folders that Hydra begins in the value."""
    begun = Begun()
    token = _BEGUN.set(begun)
    try:
        yield begun
    finally:
        _BEGUN.reset(token)


class Folder(Callback):
    """Tells the command that started Hydra which folder the run, or the sweep, that is about to begin has."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if begun := _BEGUN.get(None):  # none in a launcher's worker, which no user started
            begun.run(str(config.hydra.runtime.output_dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if begun := _BEGUN.get(None):
            begun.sweep(str(config.hydra.sweep.dir))


def how_to_go_on(module: str, given: list[str], folder: str, sweep: bool) -> str:
    """Say which command goes on with what a signal ended.

    >>> how_to_go_on("pattern_bench", ["seed=1"], "runs/a", sweep=False)
    'go on with python -m pattern_bench resume=runs/a'
    >>> how_to_go_on("pattern_bench", ["-m", "seed=1,2"], "runs/b", sweep=True)
    'go on with python -m pattern_bench -m seed=1,2 hydra.sweep.dir=runs/b'

    Args:
        module: of the command, as in ``python -m MODULE``.
        given: its arguments.
        folder: of the run or the sweep; empty where none was begun.
        sweep: whether it is a sweep's.
    """
    if not folder:
        return "nothing was begun, give the same command again"
    if sweep:
        again = [argument for argument in given if not argument.startswith("hydra.sweep.dir=")]
        quoted = folder if re.fullmatch(r"[\w./-]+", folder) else f"'{folder}'"
        # Beside the other overrides: on either side of a flag, Hydra would not understand them.
        overrides = [place for place, argument in enumerate(again, 1) if "=" in argument and argument[0] != "-"]
        again.insert(overrides[-1] if overrides else len(again), f"hydra.sweep.dir={quoted}")
        return f"go on with {shlex.join(['python', '-m', module, *again])}"
    command = shlex.join(["python", "-m", module, f"resume={folder}"])
    if number_from_outside() is not None:
        return f"go on with {command}, started by torchrun or srun as before"
    return f"go on with {command}"
