"""Lightning modules: thin shells that stream batches through the arithmetic of ``core``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pattern_bench.core.collector import Collector
from pattern_bench.core.degradation import degradation_curve, rank_patches, replacement
from pattern_bench.core.layers import Scratch
from pattern_bench.core.network import Watcher, collecting
from pattern_bench.core.reading import Correlation, Reader
from pattern_bench.data.splits import Batch
from pattern_bench.errors import UserError
from pattern_bench.models.source import Training

log = logging.getLogger(__name__)


@dataclass
class Seen:
    """What a pass over a split met: images used, and positions of those left out."""

    images: int = 0
    unreadable: list[int] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        self.images += 0 if batch.images is None else len(batch.images)
        self.unreadable += batch.unreadable

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


class Stream(pl.LightningModule):
    """Predicts batch by batch and keeps what ``visit`` makes of each.

    What it keeps can be taken out with ``state`` between two batches, and a stream that is given it as ``kept`` goes on
    from there. A batch that the device's memory is too small for is visited in halves, and so are those after it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a process may have no image left
        self.model = model
        self.seen = Seen()
        self.kept: Mapping[str, Tensor] | None = None
        self.most: int | None = None

    def on_predict_start(self) -> None:
        self.start()
        if self.kept is not None:
            self.seen = Seen.from_tensors(self.kept)
            self.restore(self.kept)

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        if batch.images is not None:
            most = self.most or len(batch.images)
            parts = (part.split(most) for part in (batch.images, batch.targets, batch.positions))
            for images, targets, positions in zip(*parts, strict=True):
                self._visit(fast_layout(images), targets, positions)
        self.seen.add(batch)

    def _visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        try:
            self.visit(images, targets, positions)
            return
        except torch.OutOfMemoryError:
            pass  # and no more in here, where the traceback holds the failed attempt's tensors
        most = self.halve(len(images))
        parts = (part.split(most) for part in (images, targets, positions))
        for part in zip(*parts, strict=True):
            self._visit(*part)

    def halve(self, images: int) -> int:
        """Takes half of so many images at once from now on, and returns how many that are.

        Raises:
            UserError: where that was one image.
        """
        if images == 1:
            raise UserError(
                "the device's memory is too small for a single image: select fewer layers (layer), lower "
                "moments.memory_gib, or use another device (trainer=cpu)"
            )
        self.most = images // 2
        log.warning("out of memory with %d images at once: going on with %d (data.batch_size)", images, self.most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.most

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
        try:
            with collecting(self.model, attempts):
                self.model(images)
            return
        except torch.OutOfMemoryError:
            pass
        for part in images.split(self.halve(len(images))):
            self._watch(part, {name: attempt.known for name, attempt in attempts.items()})

    def state(self) -> dict[str, Tensor]:
        each = ((name, watcher.state()) for name, watcher in self.watchers.items())
        return super().state() | {f"{name}/{key}": tensor for name, state in each for key, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, watcher in self.watchers.items():
            start = f"{name}/"
            watcher.restore({k.removeprefix(start): t for k, t in state.items() if k.startswith(start)})


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
        scratch = Scratch()
        self.watchers = {
            name: Collector(layer, self.gram, self.memory, self.positions, self.seeds[name], scratch)
            for name, layer in layers.items()
        }

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        super().predict_step(batch, batch_index)
        finite = torch.stack([collector.finite for collector in self.watchers.values()])
        if not finite.all():
            layer = next(name for name, fine in zip(self.watchers, finite.tolist(), strict=True) if not fine)
            first, last = int(batch.positions.min()), int(batch.positions.max())
            raise UserError(
                f"layer {layer}: NaN or Inf in its input or output at batch {batch_index} (images {first} to {last} "
                "of the split): mend the weights (model.weights) or the images"
            )


class ReaderDescent(pl.LightningModule):
    """Fits the readers v of the selected layers together: Adam on their least-squares problems.

    Several processes take their share of each batch; Lightning averages their gradients, which makes that of the batch.

    Args:
        model: canonical network; it is not trained.
        readers: by layer name, calibrated.
        learning_rate: of the first step; it falls to 0 along a cosine over ``steps``.
        steps: at most.
        batch_size: of a whole batch, of all processes together; a smaller one counts for less.
    """

    strict_loading = False

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], learning_rate: float, steps: int, batch_size: int
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: it belongs in no checkpoint
        self.names = list(readers)
        self.readers = nn.ModuleList(readers.values())
        self.learning_rate, self.steps, self.batch_size = learning_rate, steps, batch_size
        self.seen = Seen()

    def on_fit_start(self) -> None:
        self._model[0].to(self.device)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        if self.current_epoch == 0:
            self.seen.add(batch)
        if batch.images is None:
            # The other processes wait for gradients of every parameter.
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0  # type: ignore[return-value]
        watched = {name: _Objective(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](fast_layout(batch.images))
        losses = torch.cat([loss for objective in watched.values() for loss in objective.losses])
        count = len(batch.images)
        self.log("loss", losses.detach().mean(), on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        # Without the weight, the images of a last, smaller batch would count for more than the others.
        return losses.sum() * (self.trainer.world_size * count / self.batch_size)

    # Lightning's own max_steps repeats a batch when training is taken up again.
    def on_train_start(self) -> None:
        stopped = any(callback.wait_count >= callback.patience for callback in self.trainer.early_stopping_callbacks)
        self.trainer.should_stop = stopped or self.trainer.global_step >= self.steps

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step >= self.steps:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen.tensors()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = Seen.from_tensors(checkpoint["seen"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Objective:
    """Keeps a layer's loss, with its graph, as the layer runs: later its tensors may be overwritten in place."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.losses: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        with torch.enable_grad():
            self.losses.append(self.reader.loss(x.clone(), y))


class ReadingStream(WatchingStream):
    """Correlates what the readers of each layer read with their target."""

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader]) -> None:
        super().__init__(model)
        self.names, self.readers = list(readers), nn.ModuleList(readers.values())
        self.watchers: dict[str, Correlation] = {}

    def start(self) -> None:
        self.watchers = {
            name: Correlation(reader)  # type: ignore[arg-type]
            for name, reader in zip(self.names, self.readers, strict=True)
        }


class AccuracyStream(Stream):
    """Counts right answers: ``right`` (2,), of the first answer and of the first five."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.right = torch.zeros(2, dtype=torch.int64)

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        logits = self.model(images)
        best = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        self.right += torch.stack([best[:, 0].sum(), best.sum()]).cpu()

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
    """

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__(model)
        self.rows: dict[str, Tensor] = {}
        self.known = torch.zeros(images, dtype=torch.bool)

    def keep(self, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Takes in the rows (B, ...) of the images at ``positions`` (B,)."""
        where = positions.cpu()
        for name, row in rows.items():
            row = row.detach().cpu()
            self.rows.setdefault(name, row.new_zeros(len(self.known), *row.shape[1:]))[where] = row
        self.known[where] = True

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"known": self.known} | {f"rows/{name}": rows for name, rows in self.rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.known = state["known"].clone()
        self.rows = {k.removeprefix("rows/"): t.clone() for k, t in state.items() if k.startswith("rows/")}


class ExplanationStream(RowStream):
    """Explanations of the classes predicted: rows ``images``, ``targets``, ``predicted``, ``confidence``, and
    ``explanation/TITLE`` for each of ``methods``."""

    def __init__(self, model: nn.Module, images: int, methods: Mapping[str, Explains]) -> None:
        super().__init__(model, images)
        self.methods = methods

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        confidence, predicted = self.model(images).softmax(1).max(1)
        found = {f"explanation/{title}": m.attribute(images, predicted) for title, m in self.methods.items()}
        rows = {"images": images, "targets": targets, "predicted": predicted, "confidence": confidence}
        self.keep(positions, rows | found)


class DegradationStream(RowStream):
    """Degradation curves of heat maps, and of a random order, for the class first predicted: rows (images, steps + 1)
    of probabilities by the method's name, and ``random_order``.

    ``random_order`` (images, rows, columns) holds the ranks of the random order by position in the split, so that
    it does not depend on batches.

    Args:
        model: the network.
        methods: whatever has ``attribute(inputs, target)``, by name.
        patch: side of a patch.
        steps: patches to replace.
        random_order: see above.
        order, how, value: which patches come first and what replaces them, as in ``core.degradation``.
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
    ) -> None:
        super().__init__(model, len(random_order))
        self.methods, self.patch, self.steps, self.random_order = methods, patch, steps, random_order
        self.order, self.how, self.value = order, how, value

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        predicted = self.model(images).argmax(1)
        ranks = {"random_order": self.random_order[positions.cpu()].to(images.device)}
        for name, method in self.methods.items():
            ranks[name] = rank_patches(method.attribute(images, predicted), self.patch, self.order)
        replaced_by = replacement(images, self.patch, self.how, self.value)
        curves = {
            name: degradation_curve(self.model, images, rank, predicted, self.patch, self.steps, replaced_by)
            for name, rank in ranks.items()
        }
        self.keep(positions, curves)


class Learner(pl.LightningModule):
    """Trains a model on class labels (cross-entropy) or real targets (squared error).

    What is drawn in an epoch, by dropout, is a function of ``seed`` and the epoch, so that training that is taken up
    again goes on as it would have.
    """

    def __init__(self, model: nn.Module, training: Training, regression: bool, steps: int, seed: int) -> None:
        super().__init__()
        self.model, self.settings, self.regression, self.steps, self.seed = model, training, regression, steps, seed

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.seed + self.current_epoch)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if batch.images is None:
            return None
        outputs = self.model(batch.images)
        if self.regression:
            return F.mse_loss(outputs.squeeze(1), batch.targets)
        return F.cross_entropy(outputs, batch.targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings.learning_rate, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
