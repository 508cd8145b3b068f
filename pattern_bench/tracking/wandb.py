"""W&B: runs with their curves, tables, pictures and files, online or offline. ``import wandb`` is the package here."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pandas as pd

from pattern_bench.errors import UserError
from pattern_bench.tracking.base import AXES, TrackedRun, Tracker, first_line, harmless
from pattern_bench.tracking.wandb_server import RESULTS, reachable

log = logging.getLogger(__name__)
FINISH_SECONDS = 60.0
"""For what is still to be uploaded when a run ends, unless ``WANDB_FINISH_TIMEOUT`` says otherwise."""
INIT_SECONDS = 30.0
"""For the server to take a run."""


class WandbTracker(Tracker):
    """A W&B run: online where there is a key and its server answers, else offline, in the run's folder.

    Everything of the run is logged again where it is taken up, under the same id: online, W&B goes on with the run;
    what an attempt offline left is replaced.
    """

    kind = "wandb"
    listens, failed = True, False

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            wandb.Settings(project=settings["project"], entity=settings["entity"], run_group=settings["group"])
        except (wandb.Error, ValueError) as error:
            raise _refused(settings, error) from error

    @classmethod
    def start(cls, settings: Mapping[str, Any], run: TrackedRun) -> Tracker:
        if os.environ.get("WANDB_MODE") == "disabled":
            return Tracker()
        try:
            return cls(settings, run)
        except UserError:
            raise
        except Exception as error:
            log.warning(
                "W&B cannot be started (%s): nothing is tracked, the run's folder has all results", first_line(error)
            )
            return Tracker()

    def __init__(self, settings: Mapping[str, Any], run: TrackedRun) -> None:
        import wandb

        try:
            self.run = _begin(settings, run, os.environ.get("WANDB_MODE") or ("online" if reachable() else "offline"))
        except UserError:
            raise
        except wandb.errors.AuthenticationError as error:
            raise _refused(settings, error) from error
        except wandb.errors.CommError as error:
            log.warning("W&B does not answer (%s): logging offline, into the run's folder", first_line(error))
            self.run = _begin(settings, run, "offline")
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

    @harmless
    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.run.log(dict(values))

    @harmless
    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{name}/{AXES[name]}": at} | {f"{name}/{key}": value for key, value in values.items()})

    @harmless
    def table(self, name: str, table: pd.DataFrame) -> None:
        import wandb

        # Else W&B cuts it off after 10,000 rows; it looks at the class alone.
        wandb.Table.MAX_ROWS = max(wandb.Table.MAX_ROWS, len(table))
        wandb.Table.MAX_ARTIFACT_ROWS = max(wandb.Table.MAX_ARTIFACT_ROWS, len(table))
        self.run.log({name: wandb.Table(dataframe=table)})

    @harmless
    def distribution(self, name: str, values: Iterable[float]) -> None:
        import wandb

        found = np.array([value for value in values if np.isfinite(value)])
        if len(found):
            self.run.log(
                {name: wandb.Histogram(np_histogram=np.histogram(found, bins=min(64, max(8, len(found) // 8))))}
            )

    @harmless
    def image(self, name: str, file: Path, caption: str) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(file), caption=caption)})

    @harmless
    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: Path | None = None) -> None:
        artifact = self._artifact(kind, name, {} if file is None else {file.name: file}, about)
        self._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    @harmless
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

    @harmless
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


def _begin(settings: Mapping[str, Any], run: TrackedRun, mode: Any) -> Any:
    """W&B's object for the run, which takes the place of what an earlier attempt left offline."""
    import wandb

    # Under ``wandb agent``, the sweep knows the run by the agent's id.
    identifier = os.environ.get("WANDB_RUN_ID", run.run_id) if "WANDB_SWEEP_ID" in os.environ else run.run_id
    for earlier in (run.folder / "wandb").glob(f"offline-run-*-{identifier}"):
        shutil.rmtree(earlier, ignore_errors=True)
    return wandb.init(
        id=identifier,
        resume=None if mode == "offline" else "allow",
        name=run.names["title"][:128],
        group=settings["group"] or _sweep_of(run.folder),
        job_type=run.job,
        tags=sorted({value[:64] for name, value in run.names.items() if name not in ("title", "layer") and value}),
        config={**run.config, "names": dict(run.names)},
        dir=run.folder,
        project=settings["project"],
        entity=settings["entity"],
        mode=mode,
        settings=wandb.Settings(
            silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS,
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
            finish_timeout_raises=True, **_git_state(),
        ),
    )  # fmt: skip


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


def _refused(settings: Mapping[str, Any], error: Exception) -> UserError:
    why = " ".join(str(error).split()).removeprefix("Error initializing run: ")
    given = ", ".join(f"logger.{name}={settings[name]}" for name in ("project", "entity", "group"))
    return UserError(f"W&B refuses the run ({why}): check the key and {given}; or give logger=csv")
