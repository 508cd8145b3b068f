"""The line that says how to go on with a command that a signal ended. Hydra tells which folder it is about."""

from __future__ import annotations

import os
import re
import shlex
import signal
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pattern_bench.processes.launch import number_from_outside, tells

_folder = ""
_sweep = False


class Folder(Callback):
    """Notes the folder of the run, or of the sweep, that is about to begin."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        global _folder
        if not _sweep:
            _folder = str(config.hydra.runtime.output_dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _folder, _sweep
        _folder, _sweep = str(config.hydra.sweep.dir), True


def tell(number: int, module: str, given: list[str]) -> None:
    """Writes the line to standard error, once for all processes of a job.

    Args:
        number: of the signal.
        module: of the command, as in ``python -m MODULE``.
        given: its arguments.
    """
    outside = number_from_outside()
    if (outside is None or outside[0] == 0) and tells():
        # Not by way of sys.stderr: the main thread may hold its lock.
        os.write(2, f"stopped by {signal.Signals(number).name}: {_what_to_do(module, given)}\n".encode())


def _what_to_do(module: str, given: list[str]) -> str:
    if not _folder:
        return "nothing was begun, give the same command again"
    if _sweep:
        again = [argument for argument in given if not argument.startswith("hydra.sweep.dir=")]
        folder = _folder if re.fullmatch(r"[\w./-]+", _folder) else f"'{_folder}'"
        # Beside the other overrides: on either side of a flag, Hydra would not understand them.
        overrides = [place for place, argument in enumerate(again, 1) if "=" in argument and argument[0] != "-"]
        again.insert(overrides[-1] if overrides else len(again), f"hydra.sweep.dir={folder}")
        return f"go on with {shlex.join(['python', '-m', module, *again])}"
    command = shlex.join(["python", "-m", module, f"resume={_folder}"])
    if number_from_outside() is not None:
        return f"go on with {command}, started by torchrun or srun as before"
    return f"go on with {command}"
