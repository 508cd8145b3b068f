"""What the machine gives a run: where it computes, and where it keeps what it has computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from pattern_bench.engine.progress import Bar, LightningBar
from pattern_bench.engine.trainer import make_trainer
from pattern_bench.storage.cache import Cache, key_of
from pattern_bench.storage.stage_state import StageState


@dataclass(frozen=True)
class Machine:
    """Device, cache and folder of a run.

    Attributes:
        folder: the run's.
        cache: shared by all runs.
        trainer_settings: the group ``trainer``.
        checkpoint_seconds: after which an unfinished stage's state is kept in the folder.
    """

    folder: Path
    cache: Cache
    trainer_settings: DictConfig
    checkpoint_seconds: float

    @classmethod
    def from_settings(cls, cfg: DictConfig, folder: Path) -> Machine:
        """
        Raises:
            UserError: where ``cache.dir`` cannot be.
        """
        return cls(folder, Cache(cfg.cache.dir, cfg.cache.gib), cfg.trainer, cfg.checkpoint.seconds)

    @cached_property
    def device(self) -> torch.device:
        """Of this process."""
        return self.trainer().strategy.root_device

    def trainer(self, bar: Bar | None = None, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        """A Lightning trainer after the settings, but for ``settings`` given here, that moves ``bar``."""
        bars = [] if bar is None else [LightningBar(bar)]
        return make_trainer(self.trainer_settings, [*bars, *callbacks], **settings)

    @property
    def rounding(self) -> dict[str, Any]:
        """The part of every key that says how products are rounded, where that is not as usual."""
        return {"tf32": True} if self.trainer_settings.get("tf32") else {}

    def unfinished(self, stage: str, **parts: Any) -> StageState:
        """The unfinished state of a stage, which depends on ``parts``."""
        return StageState(self.folder, stage, key_of(**{**parts, **self.rounding}), self.checkpoint_seconds)
