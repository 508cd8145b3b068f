"""Experiment tracking. The only module that knows W&B."""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from pattern_bench.errors import UserError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 2.0
AXES = {"degradation": "step", "descent": "epoch"}
"""Curves by the first part of their metrics' names, and what they are drawn over."""
RESULTS = "results"
"""The folder of a W&B run's files that holds those of the run's folder."""


class Tracker:
    """Where the results of a run are logged; here, nowhere (``logger=none``)."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Numbers by name."""

    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        """Points of the curves ``name/KEY`` at one place of their axis, see ``AXES``."""

    def table(self, name: str, table: pd.DataFrame) -> None:
        """A table, where the logger has a place for it (its CSV file is in the run's folder anyway)."""

    def distribution(self, name: str, values: Iterable[float]) -> None:
        """How values are distributed, where the logger has a place for it."""

    def image(self, name: str, file: Path, caption: str) -> None:
        """A picture, where the logger has a place for it."""

    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: Path | None = None) -> None:
        """What the results to come are made of: an artifact of type ``kind`` with a file, or with what identifies it.

        The same content is the same version of the artifact, whichever run makes or uses it.
        """

    def makes(self, kind: str, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        """An artifact of type ``kind`` with files by name, made of all that the run uses."""

    def keep(self, files: Mapping[str, Path]) -> None:
        """Copies of the files of the run's folder, by name."""

    def finish(self, *, succeeded: bool) -> None:
        """Writes everything out."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(succeeded=kind is None)


def track(
    settings: Mapping[str, Any], folder: Path, run_id: str, job: str, names: Mapping[str, str], config: dict[str, Any]
) -> Tracker:
    """A tracker of one run, in the logger that the configuration chose.

    Args:
        settings: the ``logger`` group.
        folder: the run's folder; everything that is kept locally goes below it.
        run_id: the same for a run that is taken up again.
        job: what kind of run it is.
        names: of the model, the data, the estimator and so on, to find and group runs by; ``title`` is the run's own.
        config: the resolved configuration, as plain data.

    Raises:
        UserError: where there is no such logger.
    """
    kind = settings["kind"]
    if kind == "none" or (kind == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
        return Tracker()
    if kind == "wandb":
        return WandbTracker(settings, folder, run_id, job, names, config)
    if kind == "csv":
        return LightningTracker(CSVLogger(folder, name="", version="csv"), config)
    if kind == "tensorboard":
        try:
            return LightningTracker(TensorBoardLogger(folder, name="", version="tensorboard"), config)
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard needs the tensorboard package: pip install 'pattern_bench[tensorboard]'"
            ) from error
    raise UserError(f"logger.kind={kind} is unknown: choose wandb, csv, tensorboard or none")


class LightningTracker(Tracker):
    """Numbers, and pictures where there is TensorBoard, in one of Lightning's loggers."""

    def __init__(self, logger: Logger, config: dict[str, Any]) -> None:
        self.logger = logger
        logger.log_hyperparams(config)

    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.logger.log_metrics(dict(values))

    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.logger.log_metrics({f"{name}/{key}": value for key, value in values.items()}, step=at)

    def image(self, name: str, file: Path, caption: str) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            from torchvision.io import ImageReadMode, read_image

            self.logger.experiment.add_image(name, read_image(str(file), ImageReadMode.RGB))

    def finish(self, *, succeeded: bool) -> None:
        self.logger.finalize("success" if succeeded else "failed")


class WandbTracker(Tracker):
    """A W&B run: online where there is a key and its server answers, else offline, in the run's folder.

    Everything of the run is logged again where it is taken up, under the same id: online, W&B goes on with the run;
    offline, what the interrupted attempt left is replaced.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: Path,
        run_id: str,
        job: str,
        names: Mapping[str, str],
        config: dict[str, Any],
    ) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if reachable() else "offline")
        # Under ``wandb agent``, the sweep knows the run by the agent's id.
        identifier = os.environ.get("WANDB_RUN_ID", run_id) if "WANDB_SWEEP_ID" in os.environ else run_id
        if mode == "offline":
            for earlier in (folder / "wandb").glob(f"offline-run-*-{identifier}"):
                shutil.rmtree(earlier, ignore_errors=True)
        self.offline = mode == "offline"
        self.run = wandb.init(
            id=identifier,
            resume=None if self.offline else "allow",
            name=names["title"][:128],
            group=settings["group"] or _sweep_of(folder),
            job_type=job,
            tags=sorted({value[:64] for name, value in names.items() if name not in ("title", "layer") and value}),
            config={**config, "names": dict(names)},
            dir=folder,
            project=settings["project"],
            entity=settings["entity"],
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        for curve, axis in AXES.items():
            self.run.define_metric(f"{curve}/{axis}", hidden=True)
            self.run.define_metric(f"{curve}/*", step_metric=f"{curve}/{axis}")
        self.finished = False

    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.run.log(dict(values))

    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{name}/{AXES[name]}": at} | {f"{name}/{key}": value for key, value in values.items()})

    def table(self, name: str, table: pd.DataFrame) -> None:
        import wandb

        logged = wandb.Table(dataframe=table)
        logged.MAX_ROWS = max(1, len(table))  # else W&B cuts it off after 10,000
        self.run.log({name: logged})

    def distribution(self, name: str, values: Iterable[float]) -> None:
        import wandb

        found = np.array([value for value in values if np.isfinite(value)])
        if len(found):
            self.run.log(
                {name: wandb.Histogram(np_histogram=np.histogram(found, bins=min(64, max(8, len(found) // 8))))}
            )

    def image(self, name: str, file: Path, caption: str) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(file), caption=caption)})

    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: Path | None = None) -> None:
        artifact = self._artifact(kind, name, {} if file is None else {file.name: file}, about)
        if self.offline:
            # ``use_artifact`` refuses to work offline, though the record that it leaves is what ``wandb sync`` reads.
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(artifact)

    def makes(self, kind: str, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        self.run.log_artifact(self._artifact(kind, name, files, about))

    def _artifact(self, kind: str, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> Any:
        import wandb

        artifact = wandb.Artifact(
            re.sub(r"[^A-Za-z0-9_.-]", "-", f"{kind}-{name}")[:128], type=kind, metadata=dict(about)
        )
        with artifact.new_file(f"{kind}.json") as stream:
            json.dump(about, stream, indent=2, sort_keys=True)
        for file, path in files.items():
            artifact.add_file(str(path), name=file)
        return artifact

    def keep(self, files: Mapping[str, Path]) -> None:
        place = Path(self.run.dir) / RESULTS
        place.mkdir(exist_ok=True)
        for name, path in files.items():
            shutil.copyfile(path, place / name)
            self.run.save(str(place / name), base_path=self.run.dir, policy="end")

    def finish(self, *, succeeded: bool) -> None:
        if not self.finished:
            self.finished = True
            self.run.finish(exit_code=0 if succeeded else 1)


def _sweep_of(folder: Path) -> str | None:
    """The name of the sweep that the run's folder belongs to; Hydra leaves a file there."""
    return folder.parent.name if (folder.parent / "multirun.yaml").is_file() else None


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
