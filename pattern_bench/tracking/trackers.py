"""Experiment tracking. The only module that knows W&B."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse
from urllib.request import getproxies, proxy_bypass

import numpy as np
import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from pattern_bench.errors import UserError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 2.0
FINISH_SECONDS = 60.0
"""For what is still to be uploaded when a run ends, unless ``WANDB_FINISH_TIMEOUT`` says otherwise."""
INIT_SECONDS = 30.0
AXES = {"degradation": "step", "descent": "epoch"}
"""Curves by the first part of their metrics' names, and what they are drawn over."""
RESULTS = "results"
"""The folder of a W&B run's files that holds those of the run's folder."""


class Tracker:
    """Where the results of a run are logged; here, nowhere (``logger=none``)."""

    listens = False

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

    def results(self, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        """The files of the run's folder, by name; and an artifact of them, made of all that the run uses."""

    def finish(self, *, succeeded: bool) -> None:
        """Writes everything out."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(succeeded=kind is None)


def check(settings: Mapping[str, Any]) -> None:
    """Whether there can be such a tracker, before there is anything to lose.

    Args:
        settings: the ``logger`` group.

    Raises:
        UserError: where there cannot.
    """
    kind = settings["kind"]
    if kind not in ("wandb", "csv", "tensorboard", "none"):
        raise UserError(f"logger.kind={kind} is unknown: choose wandb, csv, tensorboard or none")
    if kind == "tensorboard":
        try:
            importlib.import_module("tensorboard")
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard needs the tensorboard package: pip install 'pattern_bench[tensorboard]'"
            ) from error
    if kind == "wandb":
        import wandb

        try:
            wandb.Settings(project=settings["project"], entity=settings["entity"], run_group=settings["group"])
        except (wandb.Error, ValueError) as error:
            raise _refused(settings, error) from error


def _refused(settings: Mapping[str, Any], error: Exception) -> UserError:
    why = " ".join(str(error).split()).removeprefix("Error initializing run: ")
    given = ", ".join(f"logger.{name}={settings[name]}" for name in ("project", "entity", "group"))
    return UserError(f"W&B refuses the run ({why}): check the key and {given}; or give logger=csv")


def track(
    settings: Mapping[str, Any], folder: Path, run_id: str, job: str, names: Mapping[str, str], config: dict[str, Any]
) -> Tracker:
    """A tracker of one run, in the logger that the configuration chose.

    What goes wrong with it later costs what is tracked, not the run, and is said once.

    Args:
        settings: the ``logger`` group, see :func:`check`.
        folder: the run's folder; everything that is kept locally goes below it.
        run_id: the same for a run that is taken up again.
        job: what kind of run it is.
        names: of the model, the data, the estimator and so on, to find and group runs by; ``title`` is the run's own.
        config: the resolved configuration, as plain data.

    Raises:
        UserError: where W&B refuses the run.
    """
    kind = settings["kind"]
    if kind == "csv":
        return LightningTracker(CSVLogger(folder, name="", version="csv"), config)
    if kind == "tensorboard":
        return LightningTracker(TensorBoardLogger(folder, name="", version="tensorboard"), config)
    if kind == "wandb" and os.environ.get("WANDB_MODE") != "disabled":
        try:
            return WandbTracker(settings, folder, run_id, job, names, config)
        except UserError:
            raise
        except Exception as error:
            log.warning(
                "W&B cannot be started (%s): nothing is tracked, the run's folder has all results", _line(error)
            )
    return Tracker()


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """A tracker's method that warns once where it fails: what the run has computed is not to be lost over it."""

    @functools.wraps(method)
    def tried(self: Any, *given: Any, **named: Any) -> None:
        try:
            method(self, *given, **named)
        except Exception as error:
            if not self.failed:
                log.warning("not everything can be tracked (%s): the run's folder has all results", _line(error))
            self.failed = True

    return tried


class LightningTracker(Tracker):
    """Numbers, and pictures where there is TensorBoard, in one of Lightning's loggers."""

    listens, failed = True, False

    def __init__(self, logger: Logger, config: dict[str, Any]) -> None:
        self.logger = logger
        logger.log_hyperparams(config)

    @_harmless
    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.logger.log_metrics(dict(values))

    @_harmless
    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.logger.log_metrics({f"{name}/{key}": value for key, value in values.items()}, step=at)

    @_harmless
    def image(self, name: str, file: Path, caption: str) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            from torchvision.io import ImageReadMode, read_image

            self.logger.experiment.add_image(name, read_image(str(file), ImageReadMode.RGB))

    @_harmless
    def finish(self, *, succeeded: bool) -> None:
        self.logger.finalize("success" if succeeded else "failed")


class WandbTracker(Tracker):
    """A W&B run: online where there is a key and its server answers, else offline, in the run's folder.

    Everything of the run is logged again where it is taken up, under the same id: online, W&B goes on with the run;
    what an attempt offline left is replaced.
    """

    listens, failed = True, False

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

        # Under ``wandb agent``, the sweep knows the run by the agent's id.
        identifier = os.environ.get("WANDB_RUN_ID", run_id) if "WANDB_SWEEP_ID" in os.environ else run_id
        for earlier in (folder / "wandb").glob(f"offline-run-*-{identifier}"):
            shutil.rmtree(earlier, ignore_errors=True)

        def begin(mode: Any) -> Any:
            return wandb.init(
                id=identifier,
                resume=None if mode == "offline" else "allow",
                name=names["title"][:128],
                group=settings["group"] or _sweep_of(folder),
                job_type=job,
                tags=sorted({value[:64] for name, value in names.items() if name not in ("title", "layer") and value}),
                config={**config, "names": dict(names)},
                dir=folder,
                project=settings["project"],
                entity=settings["entity"],
                mode=mode,
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS,
                    finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
                    finish_timeout_raises=True, **_git_state(),
                ),
            )  # fmt: skip

        try:
            self.run = begin(os.environ.get("WANDB_MODE") or ("online" if reachable() else "offline"))
        except UserError:
            raise
        except wandb.errors.AuthenticationError as error:
            raise _refused(settings, error) from error
        except wandb.errors.CommError as error:
            log.warning("W&B does not answer (%s): logging offline, into the run's folder", _line(error))
            self.run = begin("offline")
        except (wandb.Error, ValueError) as error:
            raise _refused(settings, error) from error
        self.run._log_artifact = self._log_artifact  # tables are artifacts too
        self.place = Path(self.run.dir).parent
        # Else W&B keeps what artifacts are made of in the user's home until it is uploaded.
        self.data_dir = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = self.data_dir or str(self.place)
        for curve, axis in AXES.items():
            self.run.define_metric(f"{curve}/{axis}", hidden=True)
            self.run.define_metric(f"{curve}/*", step_metric=f"{curve}/{axis}")
        self.finished = False
        if not self.run.offline:
            log.info("W&B: %s", self.run.url)

    @_harmless
    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.run.log(dict(values))

    @_harmless
    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{name}/{AXES[name]}": at} | {f"{name}/{key}": value for key, value in values.items()})

    @_harmless
    def table(self, name: str, table: pd.DataFrame) -> None:
        import wandb

        # Else W&B cuts it off after 10,000 rows; it looks at the class alone.
        wandb.Table.MAX_ROWS = max(wandb.Table.MAX_ROWS, len(table))
        wandb.Table.MAX_ARTIFACT_ROWS = max(wandb.Table.MAX_ARTIFACT_ROWS, len(table))
        self.run.log({name: wandb.Table(dataframe=table)})

    @_harmless
    def distribution(self, name: str, values: Iterable[float]) -> None:
        import wandb

        found = np.array([value for value in values if np.isfinite(value)])
        if len(found):
            self.run.log(
                {name: wandb.Histogram(np_histogram=np.histogram(found, bins=min(64, max(8, len(found) // 8))))}
            )

    @_harmless
    def image(self, name: str, file: Path, caption: str) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(file), caption=caption)})

    @_harmless
    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: Path | None = None) -> None:
        artifact = self._artifact(kind, name, {} if file is None else {file.name: file}, about)
        self._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    @_harmless
    def results(self, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        for file, path in files.items():
            _link(path, Path(self.run.dir) / RESULTS / file)
        self.run.save(str(Path(self.run.dir) / RESULTS / "*"), base_path=self.run.dir, policy="end")
        self._log_artifact(self._artifact("results", name, files, about))

    def _log_artifact(self, artifact: Any, *_: Any, **how: Any) -> Any:
        """Leaves a record of the artifact, which is sent when it can be, by ``wandb sync`` if need be.

        W&B leaves one offline. Online it sends a request instead, after it has asked the server two questions: where
        the server is gone, it waits for all of them and then has nothing that it could send later. And to say that an
        artifact is used, it refuses offline, and online waits for its upload.
        """
        artifact.finalize()
        how = {name: bool(how.get(name)) for name in ("is_user_created", "use_after_commit")}
        self.run._interface.publish_artifact(self.run, artifact, ["latest"], **how)
        return artifact

    def _artifact(self, kind: str, of: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> Any:
        import wandb

        artifact = wandb.Artifact(
            re.sub(r"[^A-Za-z0-9_.-]", "-", f"{kind}-{of}")[:128], type=kind, metadata=dict(about)
        )
        place = self.place / "artifacts" / artifact.name
        place.mkdir(parents=True)
        (place / f"{kind}.json").write_text(json.dumps(about, indent=2, sort_keys=True))
        for name, path in files.items():
            _link(path, place / name)
        for file in place.iterdir():  # which stay as they are: W&B needs no copies
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        return artifact

    def finish(self, *, succeeded: bool) -> None:
        if not self.finished:
            self.finished = True
            self._finish(succeeded)

    @_harmless
    def _finish(self, succeeded: bool) -> None:
        try:
            self.run.finish(exit_code=0 if succeeded else 1)
        except TimeoutError:
            log.warning(
                "W&B did not take everything in time: wandb sync --include-online %s sends the rest", self.place
            )
        finally:
            if self.data_dir is None:
                os.environ.pop("WANDB_DATA_DIR", None)


def _link(file: Path, to: Path) -> None:
    """The same file in another place; files are replaced, never changed. A copy, where the disk has no links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def _git_state() -> dict[str, Any]:
    """W&B's settings where the repository's address has a user, whose name may be a token: W&B itself takes out no more
    than the password, and looks for neither address nor commit where it is given one."""
    try:
        address = urlparse(_git("config", "--get", "remote.origin.url"))
        if not address.username:
            return {}
        without = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
        return {"git_remote_url": without, "git_commit": _git("rev-parse", "HEAD")}
    except (OSError, ValueError):  # no git; no address
        return {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()  # noqa: S603, S607


def _sweep_of(folder: Path) -> str | None:
    """The name of the sweep that the run's folder belongs to; Hydra leaves a file there."""
    return folder.parent.name if (folder.parent / "multirun.yaml").is_file() else None


def _server() -> ParseResult:
    """The address of W&B's server: the environment's, or that which ``wandb login --host`` left."""
    import wandb
    from pydantic import ValidationError

    try:
        return urlparse(wandb.setup(wandb.Settings(silent=True)).settings.base_url)
    except ValidationError as error:  # without the values: an address may hold a password
        wrong = [f"WANDB_{'_'.join(map(str, each['loc'])).upper()} ({each['msg']})" for each in error.errors()]
        raise UserError(f"not possible: {', '.join(wrong)}: mend it, or give logger=csv") from error


def _has_key(server: ParseResult) -> bool:
    """Whether W&B will find a key, rather than ask for one."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return read_netrc_auth(host=server.geturl()) is not None
    except AuthenticationError:  # W&B will say what is wrong with it
        return True


def reachable() -> bool:
    """Whether there is a key for W&B's server, and it or the proxy before it answers; never asks, and waits
    ``CONNECT_SECONDS`` at most."""
    server = _server()
    host = server.hostname or ""
    if not _has_key(server):
        return False
    proxy = None if proxy_bypass(host) else getproxies().get(server.scheme)
    way = urlparse(proxy) if proxy else server
    address = (way.hostname or "", way.port or (443 if way.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection(address, CONNECT_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)  # where there is no network, finding the address may take longer
    if not answered.is_set():
        log.warning("W&B at %s does not answer: logging offline, into the run's folder", host)
    return answered.is_set()


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
    server = _server()
    host = server.hostname or ""
    if not _has_key(server):
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
