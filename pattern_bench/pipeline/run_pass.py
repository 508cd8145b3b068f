"""A pass over a split: every process streams its share of the images, from where an interrupted run left off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from pattern_bench.core.memory import fits
from pattern_bench.data.base import Source
from pattern_bench.data.splits import Batch, Split
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import Seen, Stream
from pattern_bench.pipeline.machine import Machine
from pattern_bench.processes import collectives, signals
from pattern_bench.storage.stage_state import StageState


@dataclass(frozen=True)
class Visited:
    """Images that all processes together went through: how many were used, and names of those that cannot be read."""

    images: int = 0
    unreadable: tuple[str, ...] = ()

    def __add__(self, other: Visited) -> Visited:
        return Visited(self.images + other.images, self.unreadable + other.unreadable)

    @classmethod
    def of(cls, split: Split, seen: Seen) -> Visited:
        """What the processes have ``seen`` of a split together."""
        left_out = torch.zeros(len(split), dtype=torch.int32)
        left_out[torch.tensor(seen.unreadable, dtype=torch.int64)] = 1
        names = [split.name(position) for position in collectives.all_reduce(left_out).nonzero().flatten().tolist()]
        return cls(int(collectives.all_reduce(torch.tensor(seen.images))), tuple(names))


class _KeepState(pl.Callback):
    """Keeps a stream's state after some of its batches."""

    def __init__(self, stream: Stream, state: StageState, images: int) -> None:
        self.stream, self.state, self.images = stream, state, images

    def on_predict_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.images += len(batch.positions) + len(batch.unreadable)
        if signals.asked():
            self.state.save(self.stream.state(), self.images)
            signals.obey()
        self.state.save_now_and_then(self.stream.state, self.images)


def stream_over(
    machine: Machine,
    source: Source,
    stream: Stream,
    split: Split,
    state: StageState,
    bar: Bar,
    batch_size: int | None = None,
    keep: bool = True,
) -> Visited:
    """Show ``stream`` this process's share of a split.

    Args:
        machine: where it computes.
        source: of the images: how many at once, and how many processes load them.
        stream: what takes them in.
        split: the images.
        state: of the stream, which goes there now and then; what is there already is not visited again.
        bar: moved image by image.
        batch_size: another than the source's.
        keep: whether the stream's last state goes to ``state`` too, for a run that is interrupted in a later stage.

    Returns:
        What all processes visited.

    Raises:
        UserError: where the device's memory is too small for the stream, or for a single image.
    """
    batch_size = batch_size or source.batch_size
    positions = split.share(batch_size, collectives.rank(), collectives.world_size())
    done = 0
    if (kept := state.load()) is not None:
        tensors, done = kept
        stream.continue_from(tensors)
    loader = split.loader(positions[done:], batch_size, source.workers)
    bar.add_images(len(positions), done)
    # Methods that explain need autograd.
    trainer = machine.trainer(bar, _KeepState(stream, state, done), inference_mode=False)
    with signals.looking():
        enough = fits(lambda: trainer.predict(stream, loader, return_predictions=False))
    if not enough:
        raise stream.too_small("what this stage keeps")
    if not len(positions[done:]):
        # Lightning passes over an empty loader without a word to the module.
        stream.to(machine.device)
        stream.on_predict_start()
    elif keep:
        state.save(stream.state(), len(positions))
    return Visited.of(split, stream.seen)
