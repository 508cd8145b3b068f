"""A run's folder: the files that it leaves there, and their copies in the tracker. The first process alone writes."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pattern_bench.errors import UserError
from pattern_bench.processes import collectives
from pattern_bench.results.complete_run import CONFIG
from pattern_bench.results.schema import versions, write_csv, write_json
from pattern_bench.storage.atomic import write_file
from pattern_bench.storage.stage_state import PARTIAL
from pattern_bench.storage.tensor_files import write_tensors
from pattern_bench.storage.untrusted import UNREADABLE, read_json, read_yaml
from pattern_bench.tracking.base import Tracker
from pattern_bench.tracking.start import check, track


class RunFolder:
    """Writes the results of a run: files into its folder, and the same to the tracker.

    Args:
        folder: the run's.
        tracker: of the first process; None in the others.
        run_id: see :func:`begin`.
    """

    def __init__(self, folder: Path, tracker: Tracker | None, run_id: str) -> None:
        self.folder, self.tracker, self.run_id = folder, tracker, run_id
        self.files = {CONFIG: folder / CONFIG}

    def csv(self, name: str, table: pd.DataFrame) -> None:
        """Write a table to the file ``name``."""
        if self.tracker is not None:
            write_csv(self._file(name), table)

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write plain data to the file ``name``."""
        if self.tracker is not None:
            write_json(self._file(name), content)

    def tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write tensors to the file ``name``, which the tracker is not given: tensors may have gigabytes."""
        if self.tracker is not None:
            write_tensors(self.folder / name, tensors, metadata)

    def picture(self, name: str, file: str, caption: str, draw: Callable[[Path], Any]) -> None:
        """Let ``draw`` make a picture, unless it returns False because there is nothing to draw."""
        if self.tracker is not None and draw(self.folder / file) is not False:
            self.tracker.image(name, self._file(file), caption)

    @property
    def listened(self) -> bool:
        """Whether what is told of a stage while it runs goes anywhere."""
        return self.tracker is not None and self.tracker.listens

    def metrics(self, values: Mapping[str, float]) -> None:
        """Tell the tracker numbers that the run ends with, by name."""
        if self.tracker is not None:
            self.tracker.metrics(values)

    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        """Tell the tracker a point of the curves ``name/KEY``, at the step ``at``."""
        if self.tracker is not None:
            self.tracker.curve(name, at, values)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Show a table in the tracker."""
        if self.tracker is not None:
            self.tracker.table(name, table)

    def distribution(self, name: str, values: Iterable[float]) -> None:
        """Show a histogram of values in the tracker."""
        if self.tracker is not None:
            self.tracker.distribution(name, values)

    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: str | None = None) -> None:
        """Tell the tracker what the results depend on: an artifact of a kind, what is known of it, and its file."""
        if self.tracker is not None:
            self.tracker.uses(kind, name, about, None if file is None else self.folder / file)

    def end(self, name: str, summary: Mapping[str, Any], title: str) -> dict[str, Any]:
        """End the run, with all processes: the file ``name``, which says that it is complete, comes last.

        Args:
            name: of the file.
            summary: its content, to which the run's id and the time are added; that is returned.
            title: names the artifact of the run's results.
        """
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {"run_id": self.run_id, "ended": ended, **summary}
        collectives.barrier()
        if self.tracker is None:
            return whole
        hidden = self.folder / f".{name}"
        write_json(hidden, whole)
        self.tracker.results(title, {**self.files, name: hidden}, {"run_id": self.run_id})
        self.tracker.finish(succeeded=True)
        os.replace(hidden, self.folder / name)
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        return whole

    def _file(self, name: str) -> Path:
        self.files[name] = self.folder / name
        return self.files[name]


def begin(cfg: DictConfig, folder: Path, mark: str) -> tuple[dict[str, Any], str]:
    """Open a run's folder: checks that results can be written before anything is computed, unmakes the ``mark`` of an
    earlier run's end, and writes the configuration down.

    Returns:
        The configuration as plain data; and the run's id, eight characters, in the first process. A run that is taken
        up has the id that it had.

    Raises:
        UserError: where the folder cannot be written, or the logger is none.
    """
    run_id = ""
    if collectives.is_rank_zero():
        check(cfg.logger)
        try:
            (folder / mark).unlink(missing_ok=True)
            write_file(folder / ".writable", lambda file: file.write_text(""))
            (folder / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"hydra.run.dir={folder} cannot be written ({error.strerror}): choose another folder"
            ) from error
        write_file(folder / CONFIG, lambda file: OmegaConf.save(cfg, file, resolve=True))
        run_id = _run_id(folder)
    return OmegaConf.to_container(cfg, resolve=True), run_id  # type: ignore[return-value]


def _run_id(folder: Path) -> str:
    file = folder / PARTIAL / "run_id"
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{8}", known := file.read_text()):
            return known
    new = secrets.token_hex(4)
    with suppress(OSError):  # without room for it, only an interrupted run's W&B run would begin anew
        file.parent.mkdir(exist_ok=True)
        write_file(file, lambda part: part.write_text(new))
    return new


@contextmanager
def tracked(
    cfg: DictConfig, folder: Path, begun: tuple[dict[str, Any], str], job: str, names: Mapping[str, str]
) -> Iterator[RunFolder]:
    """Within, the folder of a run that was begun, with its tracker in the first process."""
    config, run_id = begun
    if not collectives.is_rank_zero():
        yield RunFolder(folder, None, run_id)
        return
    with track(cfg.logger, folder, run_id, job, names, config) as tracker:
        yield RunFolder(folder, tracker, run_id)


def is_complete(cfg: DictConfig, folder: Path, mark: str) -> bool:
    """Whether the folder holds the whole of this very run, by the same versions."""
    complete = False
    if collectives.is_rank_zero():
        try:
            done, then = read_json(folder / mark), read_yaml(folder / CONFIG)
            complete = then == OmegaConf.to_container(cfg, resolve=True) and done.get("versions") == versions()
        except UNREADABLE:
            complete = False
    return collectives.broadcast_text("yes" if complete else "") == "yes"
