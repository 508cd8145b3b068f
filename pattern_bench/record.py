"""What a run leaves: files in its folder, and their copies in the tracker. Only the first process leaves anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pattern_bench import ranks
from pattern_bench.errors import UserError
from pattern_bench.files import write_file, write_tensors
from pattern_bench.results import versions, write_csv, write_json
from pattern_bench.tracking import Tracker

PARTIAL = "partial"


class Record:
    """Files of a run by name, and the same in the tracker.

    Args:
        folder: the run's.
        tracker: of the first process; None in the others.
    """

    def __init__(self, folder: Path, tracker: Tracker | None) -> None:
        self.folder, self.tracker = folder, tracker

    def csv(self, name: str, table: pd.DataFrame) -> None:
        if self.tracker is not None:
            write_csv(self.folder / name, table)

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.tracker is not None:
            write_json(self.folder / name, content)

    def tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        if self.tracker is not None:
            write_tensors(self.folder / name, tensors, metadata)

    def picture(self, name: str, file: str, draw: Callable[[Path], Any]) -> None:
        """Lets ``draw`` make a picture, unless it returns False because there is nothing to draw."""
        if self.tracker is not None and draw(self.folder / file) is not False:
            self.tracker.image(name, self.folder / file)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        if self.tracker is not None:
            self.tracker.metrics(values, step)

    def table(self, name: str, table: pd.DataFrame) -> None:
        if self.tracker is not None:
            self.tracker.table(name, table)

    def end(self, name: str, summary: Mapping[str, Any]) -> None:
        """Ends the run, with all processes."""
        ranks.wait()
        if self.tracker is not None:
            complete(self.folder, name, summary)


def begin(cfg: DictConfig, folder: Path, mark: str) -> dict[str, Any]:
    """Opens a run's folder: checks that results can be written before anything is computed, unmakes the ``mark`` of an
    earlier run's end, and writes the configuration down, which it returns as plain data.

    Raises:
        UserError: where the folder cannot be written.
    """
    if ranks.first():
        try:
            (folder / mark).unlink(missing_ok=True)
            probe = folder / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"hydra.run.dir={folder} cannot be written ({error.strerror}): choose another folder"
            ) from error
        write_file(folder / "config.yaml", lambda file: OmegaConf.save(cfg, file, resolve=True))
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def complete(folder: Path, mark: str, summary: Mapping[str, Any]) -> None:
    """Writes the file that says that the run is complete, and removes what an unfinished one needs."""
    write_json(folder / mark, summary)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def is_complete(cfg: DictConfig, folder: Path, mark: str) -> bool:
    """Whether the folder holds the whole of this very run, by the same versions."""
    complete = False
    if ranks.first():
        try:
            done = json.loads((folder / mark).read_text())
            then = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
            complete = then == OmegaConf.to_container(cfg, resolve=True) and done.get("versions") == versions()
        except (OSError, ValueError, AttributeError):
            complete = False
    return ranks.text_from_any("yes" if complete else "") == "yes"
