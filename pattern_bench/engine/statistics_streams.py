"""Lightning modules that sum up statistics of layers: moments, and what readers of the residual read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.active_moments import FiringCollector
from pattern_bench.core.collector import Collector
from pattern_bench.core.layers import Scratch
from pattern_bench.core.memory import fits
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.data.splits import Batch
from pattern_bench.engine.streams import WatchingStream, not_finite


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
