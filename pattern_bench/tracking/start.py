"""The tracker of a run, by the setting ``logger.kind``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pattern_bench.core.registry import subclasses_in
from pattern_bench.errors import UserError
from pattern_bench.tracking.base import TrackedRun, Tracker


def by_kind() -> dict[str, type[Tracker]]:
    """Return the trackers of this package by their ``kind``, sorted, with ``none`` at the end.

    >>> list(by_kind())
    ['csv', 'tensorboard', 'wandb', 'none']
    """
    own = {kind.kind: kind for kind in subclasses_in(Tracker, "pattern_bench.tracking") if "kind" in vars(kind)}
    return {kind: own[kind] for kind in sorted(own)} | {Tracker.kind: Tracker}


def check(settings: Mapping[str, Any]) -> None:
    """Check that there can be such a tracker, before there is anything to lose.

    Args:
        settings: the ``logger`` group.

    Raises:
        UserError: where there cannot.
    """
    kind, trackers = settings["kind"], by_kind()
    if kind not in trackers:
        *first, last = trackers
        raise UserError(f"logger.kind={kind} is unknown: choose {', '.join(first)} or {last}")
    trackers[kind].check(settings)


def track(
    settings: Mapping[str, Any], folder: Path, run_id: str, job: str, names: Mapping[str, str], config: dict[str, Any]
) -> Tracker:
    """Start the tracker of a run, of the kind that the configuration chose.

    What goes wrong with it later costs what is tracked, not the run, and is said once.

    Args:
        settings: the ``logger`` group, which :func:`check` has passed.
        folder: see :class:`TrackedRun`, as for all that follows.
        run_id: eight characters, the same for a run that is taken up again.
        job: the command that runs.
        names: to find and group runs by.
        config: the resolved configuration, as plain data.

    Raises:
        UserError: where a server refuses the run.
    """
    return by_kind()[settings["kind"]].start(settings, TrackedRun(folder, run_id, job, names, config))
