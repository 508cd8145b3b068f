"""ρ(S) as the paper measured it: v is fitted by gradient descent, and read on the validation images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.memory import fits
from pattern_bench.core.network import collecting
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.data.splits import GlobalBatches
from pattern_bench.engine.checkpoints import every_epoch
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.statistics_streams import ReadingStream
from pattern_bench.engine.streams import Seen, fast_layout
from pattern_bench.errors import UserError
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.patterns import FittedPatterns
from pattern_bench.pipeline.rho import layer_rows
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import Visited, stream_over
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives
from pattern_bench.storage.stage_state import StageState
from pattern_bench.storage.tensor_files import checksum

ROUND = 100
"""Batches, at most, after which descent looks at its loss and keeps its state."""
DESCENT_VERSION = 2
"""Of what a descent keeps; another's is begun again."""
Tell = Callable[[int, dict[str, float]], None]
"""Takes the number of a round and its ``loss`` and ``rho``."""


# --- v is fitted ---


def descend(
    setup: Setup, machine: Machine, patterns: Mapping[str, Pattern], bar: Bar, tell: Tell, listened: bool
) -> tuple[dict[str, Reader], dict[str, Any], Visited]:
    """Fit the readers v of the selected layers on the probe split.

    The readers of the round with the lowest loss are kept in the run's ``checkpoints``, and are those returned.

    Args:
        setup: data, network and settings.
        machine: where they are fitted, and what keeps them.
        patterns: by layer, (N, D).
        bar: moved step by step.
        tell: takes each round's loss, and ρ of some validation images, as soon as the round is over; those of an
            interrupted run again, at once.
        listened: whether anybody wants that ρ; otherwise it is NaN, and costs nothing.

    Returns:
        Readers by layer; how many steps it took, the loss, and whether it stopped early; the images visited.

    Raises:
        UserError: where the memory is too small, a loss is NaN or infinite, or no image can be read.
    """
    split, source = setup.splits["probe"], setup.source
    module = _module(setup, machine.device, patterns)
    readers: dict[str, Any] = dict(zip(module.names, module.readers, strict=True))
    state = _state(setup, machine, patterns)
    if (kept := state.load()) is not None:
        took = _taken_up(module, kept[0], tell)
        return readers, took, Visited.of(split, Seen.from_tensors(kept[0]))
    _calibrate(setup, machine, module)
    bar.start(setup.cfg.probe.steps, unit="steps")
    best = ModelCheckpoint(
        machine.folder / "checkpoints", "readers-{step}", monitor="loss", save_on_train_epoch_end=True
    )
    patience = EarlyStopping("loss", patience=setup.cfg.probe.patience, min_delta=1e-5, check_on_train_epoch_end=True)
    telling = _TellOfRounds(module, tell, _held_out_rho(setup, machine, module, patterns, listened))
    # Last, so that it holds what the others have come to.
    every_round, last = every_epoch(machine.folder, f"readers-{state.key}")
    trainer = machine.trainer(bar, telling, best, patience, every_round, max_epochs=-1)
    loader = split.shuffled(module.batches, source.workers)
    if not fits(lambda: trainer.fit(module, loader, ckpt_path=last, weights_only=True)):
        raise module.too_small("the readers of all layers and what Adam keeps of them")
    fitted = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    fitted = _of_readers(fitted)
    module.load_state_dict(fitted)
    took = {
        "steps": trainer.global_step,
        "loss": float(best.best_model_score or 0),
        "stopped_early": patience.stopped_epoch > 0,
    }
    ends = {"steps": took["steps"], "loss": took["loss"], "early": took["stopped_early"]}
    end = {name: torch.tensor(value, dtype=torch.float64) for name, value in ends.items()}
    rounds = torch.tensor([[values["loss"], values["rho"]] for values in module.rounds], dtype=torch.float64)
    state.save(fitted | end | {"rounds": rounds} | module.seen.tensors(), len(split))
    return readers, took, Visited.of(split, module.seen)


def _module(setup: Setup, device: torch.device, patterns: Mapping[str, Pattern]) -> ReaderDescent:
    cfg = setup.cfg.probe
    layers: dict[str, Any] = {layer: setup.model.get_submodule(layer) for layer in patterns}
    readers = {
        layer: Reader(layers[layer], pattern, setup.cfg.criterion, cfg.regularisation).to(device)
        for layer, pattern in patterns.items()
    }
    setup.model.to(device)
    images = len(setup.splits["probe"])
    batches = GlobalBatches(
        images, setup.source.batch_size, setup.cfg.seed, collectives.rank(), collectives.world_size(), most=ROUND
    )
    return ReaderDescent(setup.model, readers, cfg.learning_rate, cfg.steps, batches)


def _state(setup: Setup, machine: Machine, patterns: Mapping[str, Pattern]) -> StageState:
    used = {f"{layer}/{part}": tensor for layer, p in patterns.items() for part, tensor in vars(p).items()}
    parts = {
        "version": DESCENT_VERSION, "model": setup.model_key, "images": setup.splits["probe"].fingerprint,
        "patterns": checksum(used, {}), "seed": setup.cfg.seed,
        "criterion": setup.cfg.criterion, "probe": dict(setup.cfg.probe), "batch_size": setup.source.batch_size,
    }  # fmt: skip
    return machine.unfinished("readers", **parts)


def _of_readers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("readers.")}


def _taken_up(module: ReaderDescent, state: Mapping[str, Tensor], tell: Tell) -> dict[str, Any]:
    """What a descent took that had ended before its run was interrupted; ``module`` is given its readers."""
    module.load_state_dict(_of_readers(state))
    for epoch, values in enumerate(state["rounds"].tolist()):
        tell(epoch, dict(zip(("loss", "rho"), values, strict=True)))
    return {"steps": int(state["steps"]), "loss": float(state["loss"]), "stopped_early": bool(state["early"])}


class _TellOfRounds(pl.Callback):
    """Tells of every round, those of an interrupted run at once."""

    def __init__(self, module: ReaderDescent, tell: Tell, measure: Callable[[], float]) -> None:
        self.module, self.tell, self.measure = module, tell, measure

    def on_train_start(self, *_: Any) -> None:
        for epoch, values in enumerate(self.module.rounds):
            self.tell(epoch, values)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.module.rounds.append({"loss": float(trainer.callback_metrics["loss"]), "rho": self.measure()})
        self.tell(len(self.module.rounds) - 1, self.module.rounds[-1])


def _held_out_rho(
    setup: Setup, machine: Machine, module: ReaderDescent, patterns: Mapping[str, Pattern], listened: bool
) -> Callable[[], float]:
    """A function that measures the mean ρ of the live neurons, as the readers are now, on the first validation images:
    a batch at most, and few beside those of a round, since it is called after every round.

    The loss has the regularisation in it, and is of the images that the readers are fitted on. This can be compared
    between runs with another one. It is NaN where nobody listened, and where no image can be read.
    """
    split = setup.splits["validation"]
    few = max(32, len(setup.splits["probe"]) // 10)
    images = split.batch(range(min(few, setup.source.batch_size, len(split)))).images if listened else None
    readers: dict[str, Any] = dict(zip(module.names, module.readers, strict=True))

    def measure() -> float:
        if images is None:
            return float("nan")
        total = {name: Correlation(reader) for name, reader in readers.items()}

        def take(part: slice) -> None:
            watched = {name: Correlation(reader) for name, reader in readers.items()}
            with torch.no_grad(), collecting(setup.model, watched):
                setup.model(fast_layout(images[part].to(machine.device)))
            for name, correlation in watched.items():
                total[name].sums += correlation.sums

        module.in_parts(len(images), take)
        return float(torch.cat([total[name].rho().cpu()[~patterns[name].dead.cpu()] for name in total]).nanmean())

    return measure


def _calibrate(setup: Setup, machine: Machine, module: ReaderDescent) -> None:
    """Shows the readers one batch, the same in every process, or as much of it as the memory of each is enough for."""
    split = setup.splits["probe"]
    loader = setup.loader(split, split.share(len(split)))
    batch = next((batch for batch in loader if batch.images is not None), None)
    if batch is None:
        raise UserError(f"none of the {len(split)} images of the probe split can be read: mend the files")
    images = batch.images.to(machine.device)
    while not _everywhere(fits(functools.partial(module.calibrate, images, batch.positions))):
        module.halve(len(images))
        images = images[: module.most]


def _everywhere(fine: bool) -> bool:
    """Whether it is so in every process."""
    return int(collectives.all_reduce(torch.tensor(int(fine)))) == collectives.world_size()


@dataclass(frozen=True, kw_only=True)
class FittedReaders(Result):
    """The readers v by layer; and how many ``steps`` descent took, its ``loss``, and whether it ``stopped_early``."""

    readers: Mapping[str, Reader]
    descent: Mapping[str, Any]


@dataclass(frozen=True)
class FitReaders(Stage[FittedReaders]):
    """Fit v on the second half of the training images by descent; the tracker is told of every round."""

    setup: Setup
    machine: Machine
    run_folder: RunFolder
    name = "fit_readers"
    title = "fit v on the second half by descent"

    def run(self, done: Done, bar: Bar) -> FittedReaders:
        tell = functools.partial(self.run_folder.curve, "descent")
        patterns = done[FittedPatterns].patterns
        readers, took, visited = descend(self.setup, self.machine, patterns, bar, tell, self.run_folder.listened)
        return FittedReaders(readers=readers, descent=took, visited=visited)


# --- and read ---


def measure_readers(
    setup: Setup, machine: Machine, patterns: Mapping[str, Pattern], readers: Mapping[str, Reader], bar: Bar
) -> tuple[pd.DataFrame, Visited]:
    """ρ of every neuron, from what the readers read on the validation images; and the images visited."""
    split = setup.splits["validation"]
    stream = ReadingStream(setup.model, readers)
    state = machine.unfinished("read", images=split.fingerprint, readers=checksum(stream.readers.state_dict(), {}),
                               model=setup.model_key, criterion=setup.cfg.criterion)  # fmt: skip
    bar.start(0, unit="images")
    visited = stream_over(machine, setup.source, stream, split, state, bar)
    tables = []
    for layer, correlation in stream.watchers.items():
        correlation.restore({"sums": collectives.all_reduce(correlation.sums)})
        tables.append(layer_rows(setup, layer, correlation.rho(), patterns[layer].dead, "sgd"))
    return pd.concat(tables, ignore_index=True), visited


@dataclass(frozen=True, kw_only=True)
class DescentRho(Result):
    """ρ of every neuron, as rows of ``rho.csv``."""

    table: pd.DataFrame


@dataclass(frozen=True)
class MeasureReaders(Stage[DescentRho]):
    """Measure ρ(S) of every neuron with the readers fitted by descent."""

    setup: Setup
    machine: Machine
    name = "read"
    title = "ρ(S) of every neuron, by descent"

    def run(self, done: Done, bar: Bar) -> DescentRho:
        patterns, readers = done[FittedPatterns].patterns, done[FittedReaders].readers
        table, visited = measure_readers(self.setup, self.machine, patterns, readers, bar)
        return DescentRho(table=table, visited=visited)
