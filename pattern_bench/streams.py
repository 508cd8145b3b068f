"""Lightning modules: thin shells that stream batches through the arithmetic of ``core``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pattern_bench.core.collector import Collector
from pattern_bench.core.degradation import degradation_curve, rank_patches, replacement
from pattern_bench.core.layers import Scratch
from pattern_bench.core.memory import fits
from pattern_bench.core.network import Watcher, collecting, layers_in_order
from pattern_bench.core.reading import Correlation, Reader
from pattern_bench.data.splits import Batch, GlobalBatches
from pattern_bench.errors import UserError
from pattern_bench.halving import Halving
from pattern_bench.models.source import Training


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
    """The model's outputs, (B, K).

    Raises:
        UserError: naming the first layer where something was NaN or infinite, where that shows in them.
    """
    logits: Tensor = model(images)
    if not logits.softmax(1).isfinite().all():
        raise not_finite(first_not_finite(model, images) or "after the last one", positions)
    return logits


def first_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """The first layer whose output is NaN or infinite somewhere, or None."""
    watched = {name: _Finite() for name in layers_in_order(model, images)}
    with torch.no_grad(), collecting(model, watched):
        model(images)
    return next((name for name, layer in watched.items() if not layer.finite), None)


class _Finite:
    """Whether all that a layer put out was finite."""

    finite = True

    def add(self, x: Tensor, y: Tensor) -> None:
        self.finite = self.finite and bool(y.isfinite().all())


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
        finite = torch.stack([collector.finite for collector in self.watchers.values()])
        if not finite.all():
            raise not_finite(list(self.watchers)[finite.tolist().index(False)], batch.positions)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None or other is None else one + other


class _WithGradients(torch.autograd.Function):
    """A loss () whose gradients are known: on the way back, each parameter is given its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return None, None, *(None if g is None else g * grad_outputs[0] for g in ctx.gradients)


class Descending(Halving, pl.LightningModule):
    """Takes a step for each batch. Its gradient is taken at once: where the device's memory is too small for a batch,
    the gradients of its parts are added up.

    Args:
        batches: that the loader will take, in rounds.
    """

    def __init__(self, batches: GlobalBatches) -> None:
        super().__init__()
        self.batches = batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning says which round it is when the loader's processes have asked for its first batches.
        self.batches.set_epoch(checkpoint["epoch"] + 1)

    def descend(self, images: int, loss: Callable[[slice], Tensor]) -> Tensor:
        """The loss of a batch of so many images, (), with its gradients.

        Args:
            images: in the batch.
            loss: of a part of it, (); those of all parts add up to the batch's.

        Raises:
            UserError: where memory is too small for a single image.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total: Tensor | None = None
        gradients: list[Tensor | None] = [None] * len(parameters)

        def take(part: slice) -> None:
            nonlocal total, gradients
            value = loss(part)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            sums = [_sum(sofar, more) for sofar, more in zip(gradients, found, strict=True)]
            total, gradients = _sum(total, value.detach()), sums

        self.in_parts(images, take)
        return _WithGradients.apply(total, gradients, *parameters)


class ReaderDescent(Descending):
    """Fits the readers v of the selected layers together: Adam on their least-squares problems.

    Several processes take their share of each batch; Lightning averages their gradients, which makes that of the batch.

    Args:
        model: canonical network; it is not trained.
        readers: by layer name, calibrated.
        learning_rate: of the first step; it falls to 0 along a cosine over ``steps``.
        steps: at most.
        batches: of the probe split; one that is smaller than the others counts for less.

    Raises:
        UserError: naming layer and batch, where an activation or a loss is NaN or infinite.
    """

    strict_loading = False

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], learning_rate: float, steps: int, batches: GlobalBatches
    ) -> None:
        super().__init__(batches)
        self._model = (model,)  # in a tuple: it belongs in no checkpoint
        self.names = list(readers)
        self.readers = nn.ModuleList(readers.values())
        self.learning_rate, self.steps = learning_rate, steps
        self.seen = Seen()

    def calibrate(self, images: Tensor, positions: Tensor) -> None:
        """Shows each reader the first call of its layer, on images (B, ...) at ``positions`` (B,) of the split."""
        watched = {name: _Calibration(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        if layer := first_not_finite(self._model[0], fast_layout(images)):
            raise not_finite(layer, positions)
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](fast_layout(images))

    def on_fit_start(self) -> None:
        self._model[0].to(self.device)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        if self.current_epoch == 0:
            self.seen.add(batch)
        if batch.images is None:
            # The other processes wait for gradients of every parameter.
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0  # type: ignore[return-value]
        images, count, terms = batch.images, len(batch.images), 0

        def loss(part: slice) -> Tensor:
            nonlocal terms
            losses = self._losses(fast_layout(images[part]), batch.positions[part])
            terms = len(losses)
            return losses.sum() * (len(images[part]) / count)

        total = self.descend(count, loss)
        self.log("loss", total.detach() / terms, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        # Without the weight, the images of a last, smaller batch would count for more than the others.
        return total * (self.trainer.world_size * count / self.batches.batch_size)

    def _losses(self, images: Tensor, positions: Tensor) -> Tensor:
        """Every neuron's, of every call of its layer, in a row."""
        watched = {name: _Objective(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](images)
        losses = torch.cat([loss for objective in watched.values() for loss in objective.losses])
        if not losses.isfinite().all():
            layer = first_not_finite(self._model[0], images)
            if layer is not None:
                raise not_finite(layer, positions)
            raise UserError(
                f"probe.learning_rate={self.learning_rate}: the loss of v is NaN or infinite in step "
                f"{self.global_step}: give a smaller one, or mend the weights (model.weights)"
            )
        return losses

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
        super().on_load_checkpoint(checkpoint)
        self.seen = Seen.from_tensors(checkpoint["seen"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Calibration:
    """Shows a reader the first call of its layer."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.done = reader, False

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.done:
            self.reader.calibrate(x, y)
        self.done = True


class _Objective:
    """Keeps a layer's loss, with its graph, as the layer runs: later its tensors may be overwritten in place."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.losses: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        with torch.enable_grad():
            self.losses.append(self.reader.loss(x.clone(), y))


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
    """Explanations of the classes predicted: rows ``images``, ``targets``, ``predicted``, ``confidence``, and
    ``explanation/TITLE`` for each of ``methods``."""

    def __init__(self, model: nn.Module, images: int, methods: Mapping[str, Explains]) -> None:
        super().__init__(model, images)
        self.methods = methods

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        confidence, predicted = answers(self.model, images, positions).softmax(1).max(1)
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
        predicted = answers(self.model, images, positions).argmax(1)
        ranks = {"random_order": self.random_order[positions.cpu()].to(images.device)}
        for name, method in self.methods.items():
            ranks[name] = rank_patches(method.attribute(images, predicted), self.patch, self.order)
        replaced_by = replacement(images, self.patch, self.how, self.value)
        curves = {
            name: degradation_curve(self.model, images, rank, predicted, self.patch, self.steps, replaced_by)
            for name, rank in ranks.items()
        }
        self.keep(positions, curves)


class Learner(Descending):
    """Trains a model on class labels (cross-entropy) or real targets (squared error).

    What is drawn in a step, by dropout, is a function of the batches' seed and the step, so that training that is taken
    up again goes on as it would have.

    Raises:
        UserError: where the loss is NaN or infinite; where memory is too small for a batch and the model has batch
            norm, which would take other statistics from its parts.
    """

    setting = "model.training.batch_size"
    remedy = "choose a smaller model"

    def __init__(self, model: nn.Module, training: Training, regression: bool, batches: GlobalBatches) -> None:
        super().__init__(batches)
        self.model, self.settings, self.regression, self.seed = model, training, regression, batches.seed

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if batch.images is None:
            return None
        images, targets = batch.images, batch.targets
        # Not once an epoch: Lightning draws too, between an epoch's start and its first batch, but for the first epoch.
        torch.manual_seed(((self.seed << 32) + self.global_step) % 2**63)

        def loss(part: slice) -> Tensor:
            outputs = self.model(images[part])
            values = (
                F.mse_loss(outputs.squeeze(1), targets[part])
                if self.regression
                else F.cross_entropy(outputs, targets[part])
            )
            return values * (len(images[part]) / len(images))

        total = self.descend(len(images), loss)
        if not total.isfinite():
            raise UserError(
                f"model.training.learning_rate={self.settings.learning_rate}: the loss is NaN or infinite in epoch "
                f"{self.current_epoch}: give a smaller one, or mend the images"
            )
        return total

    def halve(self, images: int) -> None:
        norms = [name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)]
        if norms:
            raise UserError(
                f"{self.setting}={self.settings.batch_size}: out of memory with {images} images at once, and batch "
                f"norm ({norms[0]}) would take other statistics from parts of a batch: give a smaller one, or use a "
                "device with more memory (trainer=cpu)"
            )
        super().halve(images)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings.learning_rate)
        steps = self.settings.epochs * len(self.batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
