"""Lightning modules that stream batches through the arithmetic of ``core``, and learn nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from pattern_bench.core.active_moments import FiringCollector
from pattern_bench.core.collector import Collector
from pattern_bench.core.layers import Scratch
from pattern_bench.core.memory import fits
from pattern_bench.core.network import Watcher, collecting
from pattern_bench.core.outputs import answer, spoilt
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.data.splits import Batch
from pattern_bench.engine.micro_batches import Halving
from pattern_bench.errors import UserError
from pattern_bench.metrics.degradation import degradation_curve, rank_patches, replacement


@dataclass
class Seen:
    """What a pass over a split met: images used, and positions of those left out."""

    images: int = 0
    unreadable: list[int] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        self.images += 0 if batch.images is None else len(batch.images)
        self.unreadable += map(int, batch.unreadable)

    def tensors(self) -> dict[str, Tensor]:
        return {"seen/images": torch.tensor(self.images), "seen/unreadable": torch.tensor(self.unreadable).long()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Seen:
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
    if (layer := spoilt(model, images, logits)) is not None:
        raise not_finite(layer, positions)
    return logits


class Stream(Halving, pl.LightningModule):
    """Predicts batch by batch and keeps what ``visit`` makes of each.

    What it keeps can be taken out with ``state`` between two batches, and a stream that is given it as ``kept`` goes on
    from there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a process may have no image left
        self.model = model
        self.seen = Seen()
        self.kept: Mapping[str, Tensor] | None = None

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


def refuse_not_finite(collectors: Mapping[str, Collector | FiringCollector], batch: Batch) -> None:
    """
    Raises:
        UserError: naming layer and batch, where one of the collectors has met what is NaN or infinite.
    """
    finite = torch.stack([collector.finite for collector in collectors.values()])
    if not finite.all():
        raise not_finite(list(collectors)[finite.tolist().index(False)], batch.positions)


class MomentStream(WatchingStream):
    """Adds up the moments of the named layers.

    Args:
        model: canonical network.
        layers: layer names.
        gram: whether to sum the Gram matrices, which rho needs and patterns do not.
        memory: bytes that the largest temporary may take.
        positions: share of each layer's output positions to sample.
        seeds: of the sampled positions, by layer.

    Raises:
        UserError: naming layer and batch, where an activation is NaN or infinite.
    """

    remedy = "select fewer layers (layer), lower moments.memory_gib"

    def __init__(
        self,
        model: nn.Module,
        layers: list[str],
        gram: bool,
        memory: int,
        positions: float,
        seeds: Mapping[str, int],
    ) -> None:
        super().__init__(model)
        self.layers, self.gram, self.memory, self.positions, self.seeds = layers, gram, memory, positions, seeds
        self.watchers: dict[str, Collector] = {}

    def start(self) -> None:
        layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.layers}
        self.scratch = Scratch()
        self.watchers = {
            name: Collector(layer, self.gram, self.memory, self.positions, self.seeds[name], self.scratch)
            for name, layer in layers.items()
        }

    def halve(self, images: int) -> None:
        self.scratch.memory.clear()
        super().halve(images)

    def finish(self, name: str) -> bool:
        collector = self.watchers[name]
        there = bool(collector.unfinished)
        if not fits(collector.finish):
            raise self.too_small()
        return there

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        super().predict_step(batch, batch_index)
        refuse_not_finite(self.watchers, batch)


class FiringStream(WatchingStream):
    """Adds up the moments of some neurons of the named layers where these fire.

    Args:
        model: canonical network.
        neurons: by layer, indices (K,).
        memory, positions, seeds: as of :class:`MomentStream`.

    Raises:
        UserError: naming layer and batch, where an activation is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        neurons: Mapping[str, Tensor],
        memory: int,
        positions: float,
        seeds: Mapping[str, int],
    ) -> None:
        super().__init__(model)
        self.neurons, self.memory, self.positions, self.seeds = neurons, memory, positions, seeds
        self.watchers: dict[str, FiringCollector] = {}

    def start(self) -> None:
        layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.neurons}
        self.watchers = {
            name: FiringCollector(layer, self.neurons[name], self.memory, self.positions, self.seeds[name])
            for name, layer in layers.items()
        }

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        super().predict_step(batch, batch_index)
        refuse_not_finite(self.watchers, batch)


class ReadingStream(WatchingStream):
    """Correlates what the readers of each layer read with their target.

    Raises:
        UserError: naming layer and batch, where an activation is NaN or infinite.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader]) -> None:
        super().__init__(model)
        self.names, self.readers = list(readers), nn.ModuleList(readers.values())
        self.watchers: dict[str, Correlation] = {}

    def start(self) -> None:
        self.watchers = {
            name: Correlation(reader)  # type: ignore[arg-type]
            for name, reader in zip(self.names, self.readers, strict=True)
        }

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        super().predict_step(batch, batch_index)
        finite = torch.stack([correlation.sums.isfinite().all() for correlation in self.watchers.values()])
        if not finite.all():
            raise not_finite(self.names[finite.tolist().index(False)], batch.positions)


class AccuracyStream(Stream):
    """Counts right answers: ``right`` (2,), of the first answer and of the first five."""

    remedy = "take smaller images"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.right = torch.zeros(2, dtype=torch.int64)

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        logits = answers(self.model, images, positions)
        first = answer(self.model, logits).label == targets
        if logits.shape[1] == 1:  # both of two classes are among the first five
            among = torch.ones_like(first)
        else:
            among = (logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]).any(1)
        self.right += torch.stack([first.sum(), among.sum()]).cpu()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"right": self.right}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.right = state["right"].clone()


class Explains(Protocol):
    """Any explanation method: this suite's, captum's, a user's own."""

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor: ...


class RowStream(Stream):
    """Keeps rows of results by position in the split: ``rows`` by name (images, ...), and which are ``known``
    (images,). Rows of images not yet visited are zero, so those of several processes add up.

    Args:
        model: the network.
        images: of the split.

    Raises:
        UserError: naming the images, where a row is NaN or infinite.
    """

    remedy = "choose another method, or a smaller method.batch_size where it has one"

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__(model)
        self.rows: dict[str, Tensor] = {}
        self.known = torch.zeros(images, dtype=torch.bool)

    def keep(self, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Takes in the rows (B, ...) of the images at ``positions`` (B,)."""
        where = positions.cpu()
        for name, row in rows.items():
            row = row.detach().cpu()
            if not row.isfinite().all():
                raise UserError(
                    f"{name}: NaN or Inf for images {int(where.min())} to {int(where.max())} of the split: choose "
                    "another method, or mend the weights (model.weights)"
                )
            self.rows.setdefault(name, row.new_zeros(len(self.known), *row.shape[1:]))[where] = row
        self.known[where] = True

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"known": self.known} | {f"rows/{name}": rows for name, rows in self.rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.known = state["known"].clone()
        self.rows = {k.removeprefix("rows/"): t.clone() for k, t in state.items() if k.startswith("rows/")}


class ExplanationStream(RowStream):
    """Explanations of the classes predicted: rows ``images``, ``targets``, ``predicted`` and ``confidence`` (as in
    ``core.outputs.Answer``), and ``explanation/TITLE`` for each of ``methods``."""

    def __init__(self, model: nn.Module, images: int, methods: Mapping[str, Explains]) -> None:
        super().__init__(model, images)
        self.methods = methods

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        output, label, confidence = answer(self.model, answers(self.model, images, positions))
        found = {f"explanation/{title}": m.attribute(images, output) for title, m in self.methods.items()}
        rows = {"images": images, "targets": targets, "predicted": label, "confidence": confidence}
        self.keep(positions, rows | found)


class DegradationStream(RowStream):
    """Degradation curves of heat maps, and of a random order, for the class first predicted: rows (images, steps + 1)
    of probabilities by the method's name, and ``random_order``.

    ``random_order`` (images, grid...) holds the ranks of the random order by position in the split, so that
    it does not depend on batches.

    Args:
        model: the network.
        methods: whatever has ``attribute(inputs, target)``, by name.
        patch: side of a patch.
        steps: patches to replace.
        random_order: see above.
        order, how, value: which patches come first and what replaces them, as in ``core.degradation``.
        baseline: whether to take the random order's curve, too.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Mapping[str, Explains],
        patch: int,
        steps: int,
        random_order: Tensor,
        order: str = "most",
        how: str = "mean",
        value: float = 0.0,
        baseline: bool = True,
    ) -> None:
        super().__init__(model, len(random_order))
        self.baseline = baseline
        self.methods, self.patch, self.steps, self.random_order = methods, patch, steps, random_order
        self.order, self.how, self.value = order, how, value

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        predicted = answers(self.model, images, positions).argmax(1)
        ranks = {"random_order": self.random_order[positions.cpu()].to(images.device)} if self.baseline else {}
        for name, method in self.methods.items():
            ranks[name] = rank_patches(method.attribute(images, predicted), self.patch, self.order)
        replaced_by = replacement(images, self.patch, self.how, self.value)
        curves = {
            name: degradation_curve(self.model, images, rank, predicted, self.patch, self.steps, replaced_by)
            for name, rank in ranks.items()
        }
        self.keep(positions, curves)
