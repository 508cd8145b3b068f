"""Lightning modules that stream batches through the arithmetic of ``core``, and learn nothing: what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from pattern_bench.core.memory import fits
from pattern_bench.core.network import Watcher, collecting
from pattern_bench.core.predictions import first_broken_layer
from pattern_bench.data.splits import Batch
from pattern_bench.engine.micro_batches import MicroBatches
from pattern_bench.errors import UserError


@dataclass
class Seen:
    """What one process has seen of a split: how many images were used, and positions of those that cannot be read."""

    images: int = 0
    unreadable: list[int] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        self.images += 0 if batch.images is None else len(batch.images)
        self.unreadable += map(int, batch.unreadable)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, for a file."""
        return {"seen/images": torch.tensor(self.images), "seen/unreadable": torch.tensor(self.unreadable).long()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Seen:
        """From what :meth:`tensors` gave."""
        return cls(int(tensors["seen/images"]), tensors["seen/unreadable"].tolist())


def fast_layout(images: Tensor) -> Tensor:
    """The images as the device's convolutions like them best: oneDNN's are faster on channels-last ones."""
    if images.device.type == "cpu" and images.ndim == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def not_finite(layer: str, positions: Tensor) -> UserError:
    """What is wrong where a layer's input or output is NaN or infinite for a batch of images at ``positions``."""
    return UserError(
        f"layer {layer}: NaN or Inf in its input or output, for the batch of images {int(positions.min())} to "
        f"{int(positions.max())} of the split: mend the weights (model.weights) or the images"
    )


def answers(model: nn.Module, images: Tensor, positions: Tensor) -> Tensor:
    """The model's logits, (B, K).

    Raises:
        UserError: naming the first layer where something was NaN or infinite, where that shows in them.
    """
    logits: Tensor = model(images)
    if (layer := first_broken_layer(model, images, logits)) is not None:
        raise not_finite(layer, positions)
    return logits


class Stream(MicroBatches, pl.LightningModule):
    """Predicts batch by batch and keeps what ``visit`` makes of each.

    What it keeps can be taken out with ``state`` between two batches, and a stream that is to ``continue_from`` it
    goes on from there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a process may have no image left
        self.model = model
        self.seen = Seen()
        self.kept: Mapping[str, Tensor] | None = None

    def continue_from(self, state: Mapping[str, Tensor]) -> None:
        """Go on from another's ``state``, once the loop begins."""
        self.kept = state

    def on_predict_start(self) -> None:
        self.start()
        if self.kept is not None:
            self.seen = Seen.from_tensors(self.kept)
            self.restore(self.kept)

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        if (images := batch.images) is not None:
            self.in_parts(
                len(images),
                lambda part: self.visit(fast_layout(images[part]), batch.targets[part], batch.positions[part]),
            )
        self.seen.add(batch)

    def start(self) -> None:
        """Makes, on the device, what ``visit`` adds to."""

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        """Takes in a batch: wholly, or, where memory is too small, not at all."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What was taken in so far; the tensors go on changing."""
        return self.seen.tensors()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes ``state`` up again, after ``start``."""


class _Attempt:
    """Shows a watcher the calls of its layer in one forward pass, but for the first ``known``: those it was shown
    before, with a batch that the memory turned out too small for."""

    def __init__(self, watcher: Watcher, known: int) -> None:
        self.watcher, self.known, self.calls = watcher, known, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if self.calls >= self.known:
            self.watcher.add(x, y)
            self.known += 1
        self.calls += 1


class WatchingStream(Stream):
    """Shows watchers the inputs and outputs of the layers they watch."""

    watchers: dict[str, Any]

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        self._watch(images, dict.fromkeys(self.watchers, 0))

    def _watch(self, images: Tensor, known: Mapping[str, int]) -> None:
        attempts = {name: _Attempt(watcher, known[name]) for name, watcher in self.watchers.items()}

        def attempt() -> None:
            with collecting(self.model, attempts):
                self.model(images)

        if not fits(attempt):
            self.halve(len(images))
            known = {name: attempt.known + self.finish(name) for name, attempt in attempts.items()}
            self.in_parts(len(images), lambda part: self._watch(images[part], known))

    def finish(self, name: str) -> bool:
        """Whether a layer's watcher was shown a call, without the memory to take it in; it is made to do so now."""
        return False

    def state(self) -> dict[str, Tensor]:
        each = ((name, watcher.state()) for name, watcher in self.watchers.items())
        return super().state() | {f"{name}/{key}": tensor for name, state in each for key, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, watcher in self.watchers.items():
            start = f"{name}/"
            watcher.restore({k.removeprefix(start): t for k, t in state.items() if k.startswith(start)})
