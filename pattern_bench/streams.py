"""Lightning modules: thin shells that stream batches through the arithmetic of ``core``."""

from __future__ import annotations

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
from pattern_bench.core.network import collecting
from pattern_bench.core.reading import Correlation, Reader
from pattern_bench.data.splits import Batch
from pattern_bench.models.source import Training


@dataclass
class Seen:
    """What a pass over a split met: images used and names of files left out."""

    images: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        self.images += 0 if batch.images is None else len(batch.images)
        self.unreadable += batch.unreadable


def fast_layout(images: Tensor) -> Tensor:
    """The images as the device's convolutions like them best: oneDNN's are faster on channels-last ones."""
    if images.device.type == "cpu" and images.ndim == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


class Stream(pl.LightningModule):
    """Predicts batch by batch and keeps what ``visit`` makes of each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = Seen()

    def predict_step(self, batch: Batch, batch_index: int) -> None:
        self.seen.add(batch)
        if batch.images is not None:
            self.visit(fast_layout(batch.images), batch.targets, batch.positions)

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        raise NotImplementedError


class MomentStream(Stream):
    """Adds up the moments of the named layers.

    Args:
        model: canonical network.
        layers: layer names.
        gram: whether to sum the Gram matrices, which rho needs and patterns do not.
        memory: bytes that the largest temporary may take.
        positions: share of each layer's output positions to sample.
        seeds: of the sampled positions, by layer.
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
        self.collectors: dict[str, Collector] = {}

    def on_predict_start(self) -> None:
        layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.layers}
        scratch = Scratch()
        self.collectors = {
            name: Collector(layer, self.gram, self.memory, self.positions, self.seeds[name], scratch)
            for name, layer in layers.items()
        }

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        with collecting(self.model, self.collectors):
            self.model(images)


class ReaderDescent(pl.LightningModule):
    """Fits the readers v of the selected layers together: Adam on their least-squares problems.

    Args:
        model: canonical network; it is not trained.
        readers: by layer name, calibrated.
        learning_rate: of the first step; it falls to 0 along a cosine over ``steps``.
        steps: at most.
        batch_size: of a whole batch; a smaller one counts for less.
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

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if self.current_epoch == 0:
            self.seen.add(batch)
        if batch.images is None:
            return None
        watched = {name: _Objective(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](fast_layout(batch.images))
        losses = torch.cat([loss for objective in watched.values() for loss in objective.losses])
        self.log("loss", losses.detach().mean(), on_step=False, on_epoch=True, batch_size=len(batch.images))
        # Without the weight, the images of a last, smaller batch would count for more than the others.
        return losses.sum() * (len(batch.images) / self.batch_size)

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


class ReadingStream(Stream):
    """Correlates what the readers of each layer read with their target."""

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader]) -> None:
        super().__init__(model)
        self.names, self.readers = list(readers), nn.ModuleList(readers.values())
        self.correlations: dict[str, Correlation] = {}

    def on_predict_start(self) -> None:
        self.correlations = {
            name: Correlation(reader)  # type: ignore[arg-type]
            for name, reader in zip(self.names, self.readers, strict=True)
        }

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        with collecting(self.model, self.correlations):
            self.model(images)


class AccuracyStream(Stream):
    """Counts right answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.top1 = self.top5 = 0

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        logits = self.model(images)
        best = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())


class Explains(Protocol):
    """Any explanation method: this suite's, captum's, a user's own."""

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor: ...


class DegradationStream(Stream):
    """Degradation curves of one heat map each, and of a random order, for the class first predicted.

    ``random_order`` (images, rows, columns) holds the ranks of the random order by position in the split, so that
    it does not depend on batches. ``curves`` maps a method's name to (images, steps + 1) probabilities.

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
        super().__init__(model)
        self.methods, self.patch, self.steps, self.random_order = methods, patch, steps, random_order
        self.order, self.how, self.value = order, how, value
        self.parts: dict[str, list[Tensor]] = {}

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        predicted = self.model(images).argmax(1)
        ranks = {"random_order": self.random_order[positions.cpu()].to(images.device)}
        for name, method in self.methods.items():
            ranks[name] = rank_patches(method.attribute(images, predicted), self.patch, self.order)
        replaced_by = replacement(images, self.patch, self.how, self.value)
        for name, rank in ranks.items():
            curve = degradation_curve(self.model, images, rank, predicted, self.patch, self.steps, replaced_by)
            self.parts.setdefault(name, []).append(curve.cpu())

    @property
    def curves(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class Learner(pl.LightningModule):
    """Trains a model on class labels (cross-entropy) or real targets (squared error)."""

    def __init__(self, model: nn.Module, training: Training, regression: bool, steps: int) -> None:
        super().__init__()
        self.model, self.settings, self.regression, self.steps = model, training, regression, steps

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
