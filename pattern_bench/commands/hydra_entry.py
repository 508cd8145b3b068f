"""The entry of the commands that Hydra composes: arguments, the run's folder, signals.

Imports torch only when there is work, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pattern_bench.commands import resume_hint
from pattern_bench.commands.entry import run_command, say, user_message
from pattern_bench.configuration.checks import check_choices
from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.resumed_overrides import folder_of, quoted, resumed_overrides
from pattern_bench.errors import UserError
from pattern_bench.processes import signals
from pattern_bench.processes.hydra_launchers import message_for, one_job
from pattern_bench.processes.launch import Job, cannot_use, end_with_the_launcher, launch, number_from_outside
from pattern_bench.results.complete_run import refuse_other_settings
from pattern_bench.storage.atomic import write_file
from pattern_bench.storage.folder_lock import claimed

# In addresses: a password before the host, or a signature after the path. Hydra writes down what it is given.
_RESUME = re.compile(r"\+{0,2}resume=")
_EMPTY = re.compile(r"""[+~]*[\w./@-]+=(''|"")?""")
_CREDENTIALS = re.compile(
    r"\w://[^/\s@'\"]*:[^/\s@'\"]+@|\w://[^\s'\"]*[?&][^=&]*(signature|token|secret|password|credential|api_?key)[^=&]*=",
    re.IGNORECASE,
)


@contextmanager
def run_folder(cfg: DictConfig) -> Iterator[Path]:
    """Within, Hydra's folder for this run is this job's alone, and holds the files that Hydra would write there.

    Hydra itself writes before it calls the job, so ``conf/config.yaml`` tells it not to.

    Raises:
        UserError: where another job has the folder, or it holds a complete run of other settings.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    outside = number_from_outside()
    if outside is not None and outside[0] > 0:
        yield folder
        return
    setting = "hydra.run.dir" if hydra_config.mode == RunMode.RUN else "hydra.sweep.dir"
    with claimed(folder, setting):
        name = hydra_config.job.name
        module = name if name == "pattern_bench" else f"pattern_bench.{name}"
        again = ["python", "-m", module, *hydra_config.overrides.task] if setting == "hydra.run.dir" else []
        refuse_other_settings(cfg, folder, setting, again)
        below = folder / ".hydra"
        below.mkdir(exist_ok=True)
        plain: Any = OmegaConf.to_container(hydra_config)
        own = OmegaConf.create({"hydra": {**plain, "output_subdir": below.name}})
        for name, content in (("config", cfg), ("hydra", own), ("overrides", hydra_config.overrides.task)):
            write_file(below / f"{name}.yaml", functools.partial(OmegaConf.save, content))
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                Path(handler.baseFilename).touch()
        yield folder


def start(job: Job, cfg: DictConfig, folder: Path) -> None:
    """Run ``job`` in the folder, in as many processes as ``cfg.trainer`` says, and print where its results are."""
    log_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    with one_job():
        launch(job, cfg, folder, log_config)
    outside = number_from_outside()
    if outside is None or outside[0] == 0:
        tell_results(folder)


def tell_results(folder: Path) -> None:
    """Say where the results are.

    Raises:
        UserError: where standard output cannot be written.
    """
    say(f"results: {folder}", f"the run in {folder} is complete")


def arguments(given: list[str], module: str = "pattern_bench") -> list[str]:
    """Return the command line as Hydra is to see it.

    ``resume=DIR`` becomes the overrides of the run in ``DIR``, before those given, and its folder. A process that
    torchrun or srun started beside the first leaves nothing of its own.

    Args:
        given: the command line as the user gave it.
        module: that it starts.

    Raises:
        UserError: where a setting is given without a value, an address has credentials in it, ``DIR`` is no run's
            folder or says what no folder may, or a sweep is started in several processes.
    """
    if secret := next((argument for argument in given if _CREDENTIALS.search(argument)), None):
        raise UserError(
            f"{secret.partition('=')[0]} has credentials in it, which would be written down: leave them out of the "
            "address, and put them into ~/.netrc or the environment"
        )
    # As a shell makes it of an unset variable: an empty path would be the current folder.
    if empty := next((argument for argument in given if _EMPTY.fullmatch(argument)), None):
        raise UserError(f"{empty} has no value: give one, or leave it out")
    resumed = [argument.lstrip("+") for argument in given if _RESUME.match(argument)]
    kept = [argument for argument in given if not _RESUME.match(argument)]
    folders = [folder_of(argument) for argument in resumed]
    if folders and folders[-1] != "null":
        kept = [*resumed_overrides(folders[-1], kept, module), *kept, f"hydra.run.dir={quoted(folders[-1])}"]
    outside = number_from_outside()
    if outside is None:
        return kept
    if any(argument in ("-m", "--multirun") for argument in kept):
        raise UserError(
            "--multirun starts jobs of its own: run it without torchrun and srun, with trainer.devices=N for several "
            "processes in each job"
        )
    if outside[0] > 0:
        kept += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]
    return kept


def check_sweep(given: list[str], module: str) -> None:
    """
    Raises:
        UserError: where a sweep of ``conf/sweep`` is started without ``-m``, or by a command that is not its own.
    """
    for name in (argument.removeprefix("+sweep=") for argument in given if argument.startswith("+sweep=")):
        if "," in name:
            raise UserError(f"+sweep={name} is not possible: give one sweep at a time")
        file = CONF / "sweep" / f"{name}.yaml"
        own = OmegaConf.select(OmegaConf.load(file), "hydra.job.name") if file.is_file() else None
        if own is None:  # a sweep from elsewhere, or none, which Hydra says
            continue
        right = "pattern_bench" if own == "pattern_bench" else f"pattern_bench.{own}"
        # Other flags than -m, such as --cfg, start nothing.
        if module != right or not any(argument.startswith("-") for argument in given):
            raise UserError(f"+sweep={name} is a sweep of jobs: start it with python -m {right} -m +sweep={name}")


def run_hydra_command(command: Callable[[], None], module: str = "pattern_bench") -> None:
    """Run a Hydra command, which ``python -m MODULE`` started. A signal ends it with a line that says how to go on.

    Args:
        command: a function that ``hydra.main`` decorates.
        module: that was started.

    Raises:
        SystemExit: as :func:`run_command`; after a signal, with 128 and its number.
    """
    # On a full disk, a line that has no room in the log file is not to be a traceback.
    logging.raiseExceptions = False
    # Hydra's own handler would show a traceback for every exception that is not its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # hydra/launcher=ray would report to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    outside = number_from_outside()
    if outside is not None:
        end_with_the_launcher()
    given = sys.argv[1:]

    def body() -> None:
        with (
            resume_hint.noted() as begun,
            signals.obeyed(lambda number: begun.tell(number, module, given), launched=outside is not None),
        ):
            check_sweep(given, module)
            check_choices(given)
            sys.argv[1:] = arguments(given, module)
            command()

    run_command(body, _explain)


def _explain(error: Exception) -> str | None:
    """The message for an error of Hydra's, of the disk's or of a launcher's."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        # Hydra keeps what was wrong in the cause of some of its errors.
        messages = [user_message(each) for each in (error, error.__cause__) if each is not None]
        return "\n".join(dict.fromkeys(message for message in messages if message))
    if isinstance(error, OSError):
        return cannot_use(error)
    return message_for(error)
