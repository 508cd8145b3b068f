"""The table of a sweep, in the terminal, when its jobs are through: a callback of Hydra's."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pattern_bench.errors import UserError
from pattern_bench.storage.folder_lock import claimed


class SweepTable(Callback):
    """Shows what the jobs of a sweep found together: Fig. 3 as a table, and the area over the curve. The sweep's folder
    is this sweep's alone.

    Raises:
        SystemExit: at the start of a sweep whose folder another job has.
    """

    def __init__(self) -> None:
        self._claim = ExitStack()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return SweepTable, ()  # a launcher sends copies to its workers, which claim nothing

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            self._claim.enter_context(claimed(Path(config.hydra.sweep.dir), "hydra.sweep.dir"))
        except UserError as error:  # of which Hydra would make a warning
            raise SystemExit(f"error: {error}") from None
        atexit.register(self._claim.close)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self._claim.close()
        folder = Path(config.hydra.sweep.dir)
        if config.get("quiet"):
            return
        from rich.console import Console

        from pattern_bench.reporting import console, tables
        from pattern_bench.reporting.gathering import gather

        # The sweep is through, and what it was to have is composed once more.
        GlobalHydra.instance().clear()
        try:
            found = gather([(folder, str(folder))])
        except UserError:  # a sweep of galleries, or one without a complete job, whose errors are told
            return
        rho = tables.rho_table(found.rho, found.bootstrap, found.missing_cells)
        console.show(rho, tables.areas(found.degradation), found.missing_curves, Console(stderr=True))
