"""Lightning's ``Trainer`` from the ``trainer`` settings, and the group of processes that it belongs to."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from pattern_bench.configuration.checks import TRAINER, check_trainer
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError
from pattern_bench.processes.launch import number_from_outside
from pattern_bench.processes.lost_nodes import watched
from pattern_bench.storage.atomic import write_file
from pattern_bench.storage.stage_state import keep

LONGEST_WAIT = timedelta(days=7)
"""For the first process, which alone trains models and solves for ρ. One that died is noticed by the launcher, or, on
another node, as :mod:`pattern_bench.processes.lost_nodes` says."""


def make_trainer(settings: DictConfig, callbacks: list[pl.Callback], **more: Any) -> pl.Trainer:
    """
    Raises:
        UserError: where the settings are not possible on this machine.
    """
    _quiet_lightning()
    given: Mapping[str, Any] = OmegaConf.to_container(settings, resolve=True)  # type: ignore[assignment]
    check_trainer(given)
    given = {name: value for name, value in given.items() if name not in TRAINER}  # see joined, rounding
    own: dict[str, Any] = {"plugins": [_environment(), _WholeCheckpoints()], "strategy": "auto"}
    if number_from_outside() is not None:
        own["strategy"] = DDPStrategy(timeout=LONGEST_WAIT)
    try:
        trainer = pl.Trainer(
            **{**given, **own, **more},
            callbacks=callbacks,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        asked = " ".join(f"trainer.{name}={value}" for name, value in given.items())
        raise UserError(
            f"{asked} is not possible here ({str(error).splitlines()[0]}): choose another trainer"
        ) from error
    # Its loops would take SIGTERM for themselves, and go on to the end of a stage or of the job.
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    return trainer


R = TypeVar("R")


def rounding(run: Callable[[DictConfig, Path], R]) -> Callable[[DictConfig, Path], R]:
    """Makes what takes a configuration and a folder round products of float32 numbers as ``trainer.tf32`` says.

    Raises:
        UserError: where that is neither true nor false.
    """

    @functools.wraps(run)
    def rounded(cfg: DictConfig, folder: Path) -> R:
        tf32 = cfg.trainer.get("tf32", False)
        TRAINER["tf32"].check(tf32)
        with float32_products(tf32):
            return run(cfg, folder)

    return rounded


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning writes elsewhere and moves, which on a full disk leaves half a checkpoint and ends training. Here it is
    whole or the one before, and a disk without room for it costs the checkpoint, not the training."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        file = Path(path)
        keep(file, lambda: write_file(file, lambda part: part.write_bytes(content.getbuffer())))


def _environment() -> Any:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if number_from_outside() is not None:
        # Whoever started the job starts it again.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


@contextmanager
def joined(settings: DictConfig) -> Iterator[None]:
    """Within, the processes of the job, where it has several, can reach each other."""
    lost_after = settings.get("lost_after", 600)
    TRAINER["lost_after"].check(lost_after)
    trainer = make_trainer(settings, [])
    if number_from_outside() is None:
        yield
        return
    trainer.strategy.setup_environment()
    with watched(lost_after) if settings.get("num_nodes", 1) > 1 else nullcontext():
        yield
    # Not after an error: the others would be waited for.
    torch.distributed.destroy_process_group()


def _quiet_lightning() -> None:
    """The stages say what happens; Lightning's hints about hardware, workers and sizes do not help here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*predict_dataloader.*")
