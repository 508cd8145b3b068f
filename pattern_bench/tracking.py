"""Experiment tracking through Lightning's loggers. The only module that knows W&B."""

from __future__ import annotations

import logging
import netrc
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from pattern_bench.errors import UserError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 2.0
RESULTS = "results"
"""The folder of a W&B run's files that holds those of the run's folder."""


class Tracker:
    """One run in the logger that the configuration chose.

    Args:
        settings: the ``logger`` group.
        folder: the run's folder; everything that is kept locally goes below it.
        name: a readable name.
        config: the resolved configuration, as plain data.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, name: str, config: dict[str, Any]) -> None:
        self.kind: str = settings["kind"]
        self.logger: Logger | None = None
        if self.kind == "csv":
            self.logger = CSVLogger(folder, name="", version="csv")
        elif self.kind == "tensorboard":
            try:
                self.logger = TensorBoardLogger(folder, name="", version="tensorboard")
            except ModuleNotFoundError as error:
                raise UserError(
                    "logger=tensorboard needs the tensorboard package: pip install 'pattern_bench[tensorboard]'"
                ) from error
        elif self.kind == "wandb":
            self.logger = _wandb_logger(settings, folder, name)
        elif self.kind != "none":
            raise UserError(f"logger.kind={self.kind} is unknown: choose wandb, csv, tensorboard or none")
        if self.logger is not None:
            self.logger.log_hyperparams(config)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers by name; ``step`` for points of a curve."""
        if self.logger is not None and values:
            self.logger.log_metrics(dict(values), step=step)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """A table, where the logger has a place for it (its CSV file is in the run's folder anyway)."""
        if isinstance(self.logger, WandbLogger):
            self.logger.log_table(name, dataframe=table)

    def image(self, name: str, file: Path) -> None:
        """A picture, where the logger has a place for it."""
        if isinstance(self.logger, WandbLogger):
            self.logger.log_image(name, [str(file)])
        elif isinstance(self.logger, TensorBoardLogger):
            from torchvision.io import ImageReadMode, read_image

            self.logger.experiment.add_image(name, read_image(str(file), ImageReadMode.RGB))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Writes everything out, so that the next job of a sweep starts a run of its own."""
        succeeded = kind is None
        if self.logger is not None:
            self.logger.finalize("success" if succeeded else "failed")
        if self.kind == "wandb":
            import wandb

            wandb.finish(exit_code=0 if succeeded else 1)


def _wandb_logger(settings: Mapping[str, Any], folder: Path, name: str) -> WandbLogger:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if reachable() else "offline")
    run = wandb.init(
        name=name,
        dir=folder,
        project=settings["project"],
        entity=settings["entity"],
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    return WandbLogger(experiment=run)


def reachable() -> bool:
    """Whether there is a key and its server answers; never asks, and waits ``CONNECT_SECONDS`` at most."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return False
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError:
        log.warning("W&B at %s does not answer: logging offline, into the run's folder", host)
        return False
    return True


def _in_netrc(host: str) -> bool:
    """Whether ``wandb login`` left a key for the host."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def download(project: str, into: Path) -> list[Path]:
    """Fetches what the finished runs of a W&B project left, through W&B's public API.

    Args:
        project: ``ENTITY/PROJECT``.
        into: each run's files come into ``into/RUN_ID/results``; those of an earlier download are replaced.

    Returns:
        The folders ``into/RUN_ID``, in the order in which the runs were created. Runs that left no results are named in
        the log.

    Raises:
        UserError: where the project is not one, there is no key, the server does not answer, it knows no such project
            or no finished run with results, or it names a file that would lie elsewhere.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise UserError(f"{project} is no W&B project: give ENTITY/PROJECT")
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        raise UserError(f"the W&B project {project} needs a key for {host}: run wandb login, or set WANDB_API_KEY")
    if not reachable():
        raise UserError(f"the W&B project {project} cannot be read, since {host} does not answer: try again later")
    import wandb

    found, without = [], []
    try:
        for run in wandb.Api().runs(project, filters={"state": "finished"}):
            files = [file for file in run.files(pattern=f"{RESULTS}/%") if file.name.startswith(f"{RESULTS}/")]
            for name in (run.id, *(file.name.removeprefix(f"{RESULTS}/") for file in files)):
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise UserError(f"the W&B project {project} has a file {name!r} that {into} cannot hold: remove it")
            # The summary last: a folder that has one is complete.
            for file in sorted(files, key=lambda file: file.name == f"{RESULTS}/summary.json"):
                file.download(str(into / run.id), replace=True).close()
            if files:
                found.append(into / run.id)
            else:
                without.append(f"{run.name} ({run.id})")
    except (wandb.errors.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"the W&B project {project} cannot be read ({said}): is it the right one, and yours?"
        ) from error
    if without:
        log.warning("%d runs of %s left no results: %s", len(without), project, ", ".join(without))
    if not found:
        raise UserError(f"the W&B project {project} holds no finished run with results: run the job first")
    return found
