"""The interface of trackers: the places where the results of a run are logged besides its folder.

A new tracker is a module in this package with a subclass of :class:`Tracker` that has a ``kind`` of its own, and a file
``conf/logger/NAME.yaml`` that says ``kind: KIND``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

log = logging.getLogger(__name__)
AXES = {"degradation": "step", "descent": "epoch"}
"""The horizontal axes of curves, by the curves' names."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is for.

    Attributes:
        folder: the run's folder; everything that a tracker keeps locally goes below it.
        run_id: eight characters, the same for a run that is taken up again.
        job: the command that runs: ``job``, ``gallery`` or ``sanity``.
        names: of the model, the data, the estimator and so on, to find and group runs by; ``title`` is the run's own.
        config: the resolved configuration, as plain data.
    """

    folder: Path
    run_id: str
    job: str
    names: Mapping[str, str]
    config: dict[str, Any]


class Tracker:
    """A place where the results of one run are logged. This class, ``logger=none``, logs nothing.

    A subclass overrides :meth:`start` or ``__init__``, and those methods that it has a use for. It may let a method
    fail: wrap it in :func:`harmless`, and the run goes on.

    >>> with Tracker() as tracker:
    ...     tracker.metrics({"rho/mean": 0.9})

    Attributes:
        kind: the value of ``logger.kind`` that chooses the class.
        listens: whether metrics that cost time to compute (those of a stage while it runs) are worth computing.
    """

    kind = "none"
    listens = False

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Check, before anything is computed, that there can be such a tracker. Called in the first process alone.

        Args:
            settings: the ``logger`` group of the configuration.

        Raises:
            UserError: where a package is missing or a setting is not possible.
        """

    @classmethod
    def start(cls, settings: Mapping[str, Any], run: TrackedRun) -> Tracker:
        """Return the tracker of a run that begins, or that is taken up again.

        Args:
            settings: the ``logger`` group, which :meth:`check` has passed.
            run: what there is to know of the run.

        Raises:
            UserError: where the settings are refused after all, such as by a server.
        """
        return cls()

    def metrics(self, values: Mapping[str, float]) -> None:
        """Log numbers of the whole run by name, such as ``rho/mean``."""

    def curve(self, name: str, at: int, values: Mapping[str, float]) -> None:
        """Log one point of each of the curves ``NAME/KEY``.

        Args:
            name: a key of :data:`AXES`, such as ``degradation``.
            at: the place on the axis, rising from call to call.
            values: the curves' values by key.
        """

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Log a table. It is a CSV file in the run's folder anyway."""

    def distribution(self, name: str, values: Iterable[float]) -> None:
        """Log how values, some of which may be NaN, are distributed, such as the ρ of a layer's neurons."""

    def image(self, name: str, file: Path, caption: str) -> None:
        """Log a picture, a PNG file in the run's folder."""

    def uses(self, kind: str, name: str, about: Mapping[str, Any], file: Path | None = None) -> None:
        """Log an input of the results to come, such as the data, the weights or the patterns, with its version.

        The same content is to be the same version, whichever run makes or uses it.

        Args:
            kind: ``data``, ``weights``, ``moments`` or ``patterns``.
            name: its own, among those of its kind.
            about: what identifies the version: fingerprints and settings, as plain data.
            file: the input itself, where it is a file of the run's folder.
        """

    def results(self, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        """Log the files of a run that is complete. Called once, before :meth:`finish`.

        Args:
            name: of the results as a whole.
            files: paths by the names that the files are to have.
            about: the run's id, as plain data.
        """

    def finish(self, *, succeeded: bool) -> None:
        """Write everything out. May be called twice; nothing is logged after the first call."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(succeeded=kind is None)


def harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Decorate a tracker's method so that a failure is a warning, once for each tracker: no run is lost over it.

    The tracker needs an attribute ``failed``, which is False at first.
    """

    @functools.wraps(method)
    def tried(self: Any, *given: Any, **named: Any) -> None:
        try:
            method(self, *given, **named)
        except Exception as error:
            if not self.failed:
                log.warning("not everything can be tracked (%s): the run's folder has all results", first_line(error))
            self.failed = True

    return tried


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error) or type(error).__name__).partition("\n")[0]
