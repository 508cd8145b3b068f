"""Collect the moments of a layer over a stream of batches, within the memory that there is.

The images of a batch are taken in parts. Where memory runs out all the same, the sums that were not reached are taken
over half of the images at a time (``core/layer_sums.py`` has the sums themselves).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pattern_bench.core.cancellation import cancels
from pattern_bench.core.gram import autocorrelation_applies
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layer_sums import LayerSums
from pattern_bench.core.layers import Layer, Scratch, draw_positions
from pattern_bench.core.memory import fits
from pattern_bench.core.moments import MEMORY, Moments

LEAST_POSITIONS = 256
"""Sampling leaves at least this many output positions of an image."""


def sampled_positions(share: float, positions: int) -> int:
    """Return how many output positions to draw from each image; 0 where all ``positions`` are taken.

    >>> sampled_positions(0.5, 10_000), sampled_positions(0.001, 10_000), sampled_positions(0.5, 100)
    (5000, 256, 0)
    """
    count = max(LEAST_POSITIONS, round(share * positions))
    return count if share < 1 and count < positions else 0


@dataclass
class _Work:
    """Images that are to be added: a layer's input and output, the positions drawn from each image (0 for all),
    whether products are taken in float64, and how many of the steps are done."""

    x: Tensor
    y: Tensor
    drawn: Tensor | int
    exact: bool
    done: int = 0

    def images(self, part: slice) -> _Work:
        drawn = self.drawn if isinstance(self.drawn, int) else self.drawn[part]
        return _Work(self.x[part], self.y[part], drawn, self.exact, self.done)


class Collector:
    """Collect the moments of one layer, batch by batch.

    Products are taken in the precision of the activations (float32 for those in half precision), sums over batches in
    float64. Of small patches, and of a batch whose mean is large against its deviation, products and u = wᵀx are in
    float64 too, so that no digit is lost to cancellation; the gate is the network's own.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        gram: whether to sum the Gram matrix too.
        memory: bytes that the largest temporary of a batch may take; the images of a batch are taken in parts.
        positions: share of each image's output positions to use, drawn at random but at least ``LEAST_POSITIONS``;
            the sums are scaled, so that they are unbiased estimates of those over all positions.
        seed: of the positions.
        scratch: memory for temporaries, to be shared by collectors that take turns.

    >>> layer = torch.nn.Conv1d(1, 1, 2)
    >>> collector, x = Collector(layer, gram=False), torch.tensor([[[1.0, 2.0, 4.0]]])
    >>> collector.add(x, layer(x))
    >>> moments = collector.moments()  # of the patches (1, 2) and (2, 4)
    >>> moments.n.item(), moments.x.tolist()
    (2.0, [[3.0, 6.0]])
    """

    def __init__(
        self,
        layer: Layer,
        gram: bool,
        memory: int = MEMORY,
        positions: float = 1.0,
        seed: int = 0,
        scratch: Scratch | None = None,
    ) -> None:
        self.scratch = Scratch() if scratch is None else scratch
        self.memory, self.positions = memory, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.sums = LayerSums(layer, gram, memory, self.scratch)
        self.unfinished: list[_Work] = []

    @property
    def finite(self) -> Tensor:
        """Whether all inputs and outputs were finite, () bool."""
        return self.sums.finite

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: the layer's input, (B, C, spatial...); (..., C) for a Linear layer.
            y: its output with bias, before any nonlinearity, (B, N, output spatial...); (..., N) for a Linear layer.

        Raises:
            torch.OutOfMemoryError: where the memory that is left is too small for a single image; :meth:`finish` goes
                on from there, once there is more.
        """
        x, y = wide(x), wide(y)
        geometry = self.sums.geometry
        if not geometry.kernel:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        exact = self.sums.small or cancels(x)
        drawn = sampled_positions(self.positions, y[0, 0].numel())
        values = 3 * y[0].numel() + 2 * x[0].numel()
        unfolds = self.sums.wants_gram and not autocorrelation_applies(geometry, x.shape[1], tuple(x.shape[2:]))
        if exact or drawn or unfolds:
            values += (drawn or y[0, 0].numel()) * self.sums.x.numel()
        images = max(1, self.memory // (values * (8 if exact else x.element_size())))
        for part, output in zip(x.split(images), y.split(images), strict=True):
            where = drawn and draw_positions(len(part), y[0, 0].numel(), drawn, self.generator)
            self.unfinished.append(_Work(part, output, where, exact))
        self.finish()

    @torch.no_grad()
    def finish(self) -> bool:
        """Add what an :meth:`add` found no memory for, and return whether there was anything.

        Where the memory is too small for one of the sums, it and those after it are taken over half of the images at a
        time.

        Raises:
            torch.OutOfMemoryError: as :meth:`add`.
        """
        anything = bool(self.unfinished)
        while self.unfinished:
            work = self.unfinished[0]
            if fits(partial(self._add, work)):
                del self.unfinished[0]
                continue
            self.scratch.memory.clear()
            if len(work.x) == 1:
                raise torch.OutOfMemoryError("the memory is too small for what a single image adds to a layer's sums")
            half = len(work.x) // 2
            self.unfinished[:1] = [work.images(slice(half)), work.images(slice(half, None))]
        return anything

    def _add(self, work: _Work) -> None:
        for step in itertools.islice(self.sums.steps(work.x, work.y, work.drawn, work.exact), work.done, None):
            step()
            work.done += 1

    def state(self) -> dict[str, Tensor]:
        """Return the sums as they are, for :meth:`restore`: going on from them gives the same to the bit."""
        state = self.sums.state()
        return state | {"generator": self.generator.get_state()} if state else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the :meth:`state` of a collector of the same layer and settings."""
        if state:
            self.generator.set_state(state["generator"])
            self.sums.restore({name: tensor for name, tensor in state.items() if name != "generator"})

    def moments(self) -> Moments:
        """Return the moments of all batches, on the device that they were taken on.

        The layer may have been moved since, as Lightning moves a network back to the CPU when a loop ends.
        """
        return self.sums.moments()
