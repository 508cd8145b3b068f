"""Starts the processes of a job, with PyTorch's own launcher, where nobody else did. Imports torch only for that.

Lightning could start them itself, by running the command again; under Hydra that makes stray folders and, in a sweep,
jobs that run twice. Here the job's function runs in every process, whoever started it: this module (one node),
torchrun, or Slurm's srun.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import logging
import logging.config
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from pattern_bench.errors import UserError
from pattern_bench.processes import signals

Job = Callable[[DictConfig, Path], Any]
SECONDS_TO_CLOSE = 5
"""For the processes of a job to end, once one of them has failed."""
SECONDS_TO_ASK = 1.0
"""For the first process to answer another that asks it."""
TAKEN = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Signals that PyTorch's launcher takes for itself."""
_THREADS_ALONE: ContextVar[int | None] = ContextVar("threads_alone", default=None)
"""In how many threads a process that was started here would compute if it were the only one."""


def number_from_outside() -> tuple[int, int] | None:
    """Return rank and world size, where torchrun or srun started this process among others; else None."""
    for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if number in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            size = int(os.environ.get(count, 1))
            if size > 1:
                return int(os.environ[number]), size
    return None


def tells() -> bool:
    """Whether this process is to write a message that all processes of the job have: only the first that asks is.

    A process that torchrun or srun did not start is alone, and one that cannot reach the others writes it, too.
    """
    if number_from_outside() is None:
        return True
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return True
    try:
        # The store's own attempts to connect leave warnings.
        socket.create_connection((host, int(port)), SECONDS_TO_ASK).close()
        from torch.distributed import TCPStore

        store = TCPStore(host, int(port), timeout=timedelta(seconds=SECONDS_TO_ASK), wait_for_workers=False)
        return store.add(f"pattern_bench/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (OSError, ValueError, RuntimeError):
        return True


def end_with_the_launcher() -> None:
    """Ask the kernel for SIGTERM when torchrun or srun dies: none of the job's processes is to outlive it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def processes_per_node(trainer: Mapping[str, Any]) -> int:
    """Return how many processes the ``trainer`` settings ask for on one node.

    >>> processes_per_node({"devices": 2}), processes_per_node({"accelerator": "cpu", "devices": "auto"})
    (2, 1)

    Raises:
        UserError: where ``trainer.devices`` is no such number.
    """
    devices = trainer.get("devices", 1)
    if isinstance(devices, list | ListConfig):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        if trainer.get("accelerator") == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise UserError(f"trainer.devices={devices} is not possible: give a number of processes of at least 1")
    return devices


def launch(job: Job, cfg: DictConfig, folder: Path, log_config: Any = None) -> None:
    """Run ``job(cfg, folder)`` in as many processes as ``cfg.trainer`` asks for.

    Args:
        job: a function at the top of its module.
        cfg: composed configuration.
        folder: the run's.
        log_config: how processes that are started here log, as for :func:`logging.config.dictConfig`.

    Raises:
        UserError: the job's own, once, whichever process it came from.
    """
    here = processes_per_node(cfg.trainer)
    nodes = cfg.trainer.get("num_nodes", 1)
    wanted = here * nodes
    outside = number_from_outside()
    if outside is not None:
        if wanted != outside[1]:
            raise UserError(
                f"trainer.devices={here} on trainer.num_nodes={nodes} makes {wanted} processes, but {outside[1]} were "
                "started: give the numbers that torchrun or srun was given"
            )
        _reporting(job)(cfg, folder)
    elif nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes} needs processes on every node: start the command with torchrun or srun, as the "
            "README shows"
        )
    elif here > 1 or cfg.trainer.get("strategy") == "ddp":
        _start(here, job, OmegaConf.to_container(cfg, resolve=True), folder, log_config)
    else:
        _reporting(job)(cfg, folder)


def _start(count: int, job: Job, config: Any, folder: Path, log_config: Any) -> None:
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What fails is reported below, in one message.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="pattern_bench-") as notes:
        signals.last_acts.add(functools.partial(shutil.rmtree, notes, ignore_errors=True))
        how = LaunchConfig(
            1, 1, count, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1", max_restarts=0, shutdown_timeout=SECONDS_TO_CLOSE,
            logs_specs=DefaultLogsSpecs(notes),
            # Those that this process obeys itself end the launcher in its midst, and it then ends the others.
            signals_to_handle=",".join(name for name in TAKEN if not signals.obeys(getattr(signal, name))),
        )  # fmt: skip
        try:
            with _as_before(), _one_thread_each(), _interrupts_for_the_parent():
                arguments = job, config, str(folder), log_config, os.getpid(), torch.get_num_threads()
                elastic_launch(how, _process)(*arguments)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stop.sigval) from None
        except ChildFailedError as error:
            # A process that loses another fails too, and may be heard first: all that was said is looked through.
            for message in map(_message, Path(notes).glob("**/error.json")):
                if message.startswith("UserError: "):
                    raise UserError(message.removeprefix("UserError: ")) from None
            number, failure = error.get_first_failure()
            if failure.exitcode - 128 in signals.OBEYED:  # sent to that process alone
                raise signals.Stopped(failure.exitcode - 128) from None
            # A text where a signal ended the process; else what ``record`` wrote.
            told: Any = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
            trace = told.get("extraInfo", {}).get("py_callstack", told["message"])
            raise RuntimeError(f"process {number} of {count} failed: {trace}") from None


def _message(note: Path) -> str:
    """The message that a process left when it failed."""
    try:
        return str(json.loads(note.read_text())["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _process(job: Job, config: Any, folder: str, log_config: Any, parent: int, threads: int) -> None:
    """The body of a process that was started here."""
    from torch.distributed.elastic.multiprocessing.errors import record

    _THREADS_ALONE.set(threads)
    logging.raiseExceptions = False  # as in the parent
    # The parent alone answers to the user and to a cluster's scheduler. Where it dies, this process gets SIGINT; where
    # it died before that was arranged, this process is an orphan already.
    with signals.obeyed(lambda _: None, launched=True):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if os.getppid() != parent:
            raise SystemExit(1)
        for name in ("SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        if os.environ["RANK"] != "0":
            logging.disable(logging.CRITICAL)
        elif log_config is not None:
            logging.config.dictConfig(log_config)
        record(_reporting(job))(OmegaConf.create(config), Path(folder))


def _reporting(job: Job) -> Job:
    def run(cfg: DictConfig, folder: Path) -> None:
        try:
            job(cfg, folder)
        except OSError as error:
            raise UserError(cannot_use(error, folder)) from error
        except RuntimeError as error:
            if "gloo" in str(error) or "NCCL" in str(error):
                # Another process is gone, and what became of it is what the user needs to know.
                time.sleep(SECONDS_TO_CLOSE)
            raise

    return run


def cannot_use(error: OSError, folder: Path | None = None) -> str:
    """Return the message for what the disk refused.

    >>> cannot_use(OSError(errno.ENOSPC, "No space left on device", "runs/a/rho.csv"))
    'cannot use runs/a/rho.csv (No space left on device): free space, or choose another hydra.run.dir'

    Args:
        error: names the file, where it knows it.
        folder: the likely place otherwise.
    """
    place = error.filename or folder
    where = f" {place}" if place else ""
    free = "free space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"cannot use{where} ({error.strerror or error}): {free}choose another hydra.run.dir"


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Give the signals that the launcher takes for itself back to their handlers: a sweep goes on."""
    handlers = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in TAKEN)}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # in a thread, where nothing was taken
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _interrupts_for_the_parent() -> Iterator[None]:
    """Ctrl-C reaches processes that are still being started too, and each would show a traceback.

    So they are started with SIGINT blocked, as this thread has it; another thread receives it, and Python then runs
    this one's handler.
    """
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes compute in one thread each, unless the user says otherwise: in how many a sum is taken shows in the
    sixth digit of what is computed in single precision, and results are not to depend on the number of processes."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def threads_as_alone() -> Iterator[None]:
    """Within, this process computes in as many threads as if it were the only one: while the others wait for it."""
    import torch

    here = torch.get_num_threads()
    torch.set_num_threads(_THREADS_ALONE.get() or here)
    try:
        yield
    finally:
        torch.set_num_threads(here)
