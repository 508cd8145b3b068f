"""Jobs of a sweep that a launcher other than Hydra's own starts: in worker processes, on Slurm, on Ray. Imports no
launcher: they are extras."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

from hydra.core.hydra_config import HydraConfig

from pattern_bench.errors import UserError

# The files in conf/hydra/launcher are meant to have the names of the plugins' own configurations, and to be checked
# against them. A worker process, too, comes by here before it composes its job.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema", UserWarning)


@contextlib.contextmanager
def one_job() -> Iterator[None]:
    """Within, a job may be taken off its node, and what it raises tells the process that waits for it where it was."""
    _end_as_slurm_wants()
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _hold()
        raise
    except Exception as error:
        # Exceptions go home without their traceback.
        if not isinstance(error, UserError) and HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            error.add_note(traceback.format_exc())
        raise


def _end_as_slurm_wants() -> None:
    """Makes submitit's signal handlers, where there are any, end the job for good.

    They requeue it and raise SystemExit, or ignore the signal. But torch may make an exception of its own of the one
    that is raised in the midst of it, and other processes of the job (loaders, loggers) do get the signals and take it
    down with them: the sweep would see a failed job, where Slurm starts it again.
    """
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        handler = signal.getsignal(getattr(signal, name)) if hasattr(signal, name) else None
        if not callable(handler) or not getattr(handler, "__module__", "").startswith("submitit."):
            continue
        if name != "SIGTERM":
            signal.signal(getattr(signal, name), _leaving(handler))
        elif os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            signal.signal(signal.SIGTERM, _hold)


def _leaving(handler: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except SystemExit as end:
            os._exit(int(end.code or 0) & 0xFF)

    return handle


def _hold(*_: object) -> None:
    """Waits for SIGKILL: Slurm requeues a preempted job that it has to end, but not one that ends at SIGTERM."""
    while True:
        signal.pause()


def message_for(error: Exception) -> str | None:
    """Return the message for a launcher that is not installed, cannot start a job, or has lost one (out of memory or
    time); None for an error that is no launcher's."""
    if missing := re.search(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_launcher\.", str(error)):
        return f"this hydra/launcher needs a package: pip install 'pattern_bench[{missing[1]}]'"
    if 'Could not detect "srun"' in str(error):
        return "hydra/launcher=submitit_slurm finds no srun here: start it on a cluster's login node, or choose joblib"
    if type(error).__module__.split(".")[0] in ("joblib", "submitit", "ray"):
        return f"hydra/launcher: {error}"
    return None
