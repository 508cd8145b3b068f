"""A pass over a split: every process streams its share of the images, from where an interrupted run left off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from pattern_bench.core.memory import fits
from pattern_bench.data.splits import Batch, Split
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import Seen, Stream
from pattern_bench.pipeline.setup import Setup
from pattern_bench.processes import collectives, signals
from pattern_bench.storage.stage_state import Partial


@dataclass
class Met:
    """What all processes met: images used, and names of those left out."""

    images: int
    unreadable: list[str]

    def __add__(self, other: Met) -> Met:
        return Met(self.images + other.images, self.unreadable + other.unreadable)


class _Keeping(pl.Callback):
    """Keeps a stream's state after some of its batches."""

    def __init__(self, stream: Stream, partial: Partial, images: int) -> None:
        self.stream, self.partial, self.images = stream, partial, images

    def on_predict_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.images += len(batch.positions) + len(batch.unreadable)
        if signals.asked():
            self.partial.save(self.stream.state(), self.images)
            signals.obey()
        self.partial.save_now_and_then(self.stream.state, self.images)


def stream_over(
    setup: Setup,
    stream: Stream,
    split: Split,
    partial: Partial,
    bar: Bar,
    batch_size: int | None = None,
    keep: bool = True,
) -> None:
    """Shows ``stream`` this process's share of a split.

    What it is at now and then goes into ``partial``, and what is there already is not visited again. At the end it goes
    there to ``keep``, for a run that is interrupted in a later stage, unless it has another place.

    Raises:
        UserError: where the device's memory is too small for the stream, or for a single image.
    """
    batch_size = batch_size or setup.source.batch_size
    positions = split.share(batch_size, collectives.rank(), collectives.size())
    done = 0
    if (kept := partial.load()) is not None:
        stream.kept, done = kept
    loader = setup.loader(split, positions[done:], batch_size)
    bar.add_images(len(positions), done)
    # Methods that explain need autograd.
    trainer = setup.trainer(bar, _Keeping(stream, partial, done), inference_mode=False)
    with signals.looking():
        enough = fits(lambda: trainer.predict(stream, loader, return_predictions=False))
    if not enough:
        raise stream.too_small("what this stage keeps")
    if not len(positions[done:]):
        # Lightning passes over an empty loader without a word to the module.
        stream.to(setup.device)
        stream.on_predict_start()
    elif keep:
        partial.save(stream.state(), len(positions))


def met(split: Split, seen: Seen) -> Met:
    """What the processes met together."""
    left_out = torch.zeros(len(split), dtype=torch.int32)
    left_out[torch.tensor(seen.unreadable, dtype=torch.int64)] = 1
    names = [split.name(position) for position in collectives.total(left_out).nonzero().flatten().tolist()]
    return Met(int(collectives.total(torch.tensor(seen.images))), names)
