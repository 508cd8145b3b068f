"""CSV files and TensorBoard, written by Lightning's loggers into the run's folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from pattern_bench.errors import UserError
from pattern_bench.tracking.base import TrackedRun, Tracker, harmless


class LightningTracker(Tracker):
    """Base of the trackers that are one of Lightning's loggers: settings, numbers and curves.

    Args:
        logger: of a run that has logged nothing yet.
        config: the run's configuration, as plain data.
    """

    listens, failed = True, False

    def __init__(self, logger: Logger, config: dict[str, Any]) -> None:
        self.logger = logger
        logger.log_hyperparams(config)

    @harmless
    def metrics(self, values: Mapping[str, float]) -> None:
        if values:
            self.logger.log_metrics(dict(values))

    @harmless
    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        self.logger.log_metrics({f"{name}/{key}": value for key, value in values.items()}, step=at)

    @harmless
    def finish(self, *, succeeded: bool) -> None:
        self.logger.finalize("success" if succeeded else "failed")


class CsvTracker(LightningTracker):
    """``logger=csv``: numbers and curves in ``csv/metrics.csv``, settings in ``csv/hparams.yaml``."""

    kind = "csv"

    @classmethod
    def start(cls, settings: Mapping[str, Any], run: TrackedRun) -> Tracker:
        return cls(CSVLogger(run.folder, name="", version="csv"), run.config)


class TensorBoardTracker(LightningTracker):
    """``logger=tensorboard``: numbers, curves and pictures in ``tensorboard/``. Needs the package of that name."""

    kind = "tensorboard"

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        try:
            importlib.import_module("tensorboard")
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard needs the tensorboard package: pip install 'pattern_bench[tensorboard]'"
            ) from error

    @classmethod
    def start(cls, settings: Mapping[str, Any], run: TrackedRun) -> Tracker:
        return cls(TensorBoardLogger(run.folder, name="", version="tensorboard"), run.config)

    @harmless
    def image(self, name: str, file: Path, caption: str) -> None:
        from torchvision.io import ImageReadMode, read_image

        logger: Any = self.logger
        logger.experiment.add_image(name, read_image(str(file), ImageReadMode.RGB))
