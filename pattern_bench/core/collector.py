"""Streams a layer's inputs and outputs into its moments, at the price of a few forward passes.

Per batch, three convolution weight gradients give all cross-moments (of x with the gate, with the positive part of y
and with y; the last is not needed where the Gram matrix is, since Σ x u = (Σ x xᵀ) w), and the
autocorrelation of the input gives the Gram matrix. Where output positions are sampled, their patches are unfolded
and everything is a matrix product. The rest follows from identities, because u = wᵀx:
Σ u g = wᵀ Σ x g and Σ u² g = wᵀ Σ x u g.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pattern_bench.core.gram import Autocorrelation, applies
from pattern_bench.core.layers import (
    Layer,
    Scratch,
    cross_sum,
    draw_positions,
    geometry_of,
    neurons,
    pad,
    patch_size,
    patch_sum,
    patches,
    patches_at,
)
from pattern_bench.core.memory import fits
from pattern_bench.core.moments import MEMORY, Moments

LARGE_MEAN = 10.0
"""A layer whose input has a channel with a mean above so many deviations is summed about that mean."""
LEAST_POSITIONS = 256
"""Sampling leaves at least so many output positions of an image."""


def sampled_positions(share: float, there: int) -> int:
    """Output positions to draw from each image; 0 where all that are there are taken."""
    count = max(LEAST_POSITIONS, round(share * there))
    return count if share < 1 and count < there else 0


@dataclass
class _Work:
    """Images on their way into the sums: a layer's input and output, the positions drawn from each image (0: all), and
    how many of the sums have them already."""

    x: Tensor
    y: Tensor
    drawn: Tensor | int
    done: int = 0

    def images(self, part: slice) -> _Work:
        drawn = self.drawn if isinstance(self.drawn, int) else self.drawn[part]
        return _Work(self.x[part], self.y[part], drawn, self.done)


class Collector:
    """Sums of one layer over a stream of batches.

    Products are taken in the precision of the activations, sums over batches in float64. Where the mean of the first
    batch is large against its deviation, everything is summed about these means and shifted back in float64 at the
    end, so that no digit is lost to cancellation.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        gram: whether to sum the Gram matrix too.
        memory: bytes that the largest temporary of a batch may take; the images of a batch are taken in parts.
        positions: share of each image's output positions to use, drawn at random but at least ``LEAST_POSITIONS``;
            the sums are scaled, so that they are unbiased estimates of those over all positions.
        seed: of the positions.
        scratch: memory for temporaries, to be shared by collectors that take turns.
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
        self.layer, self.memory, self.positions = layer, memory, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.geometry = geometry_of(layer)
        self.groups = self.geometry.groups
        n, d = neurons(layer), patch_size(layer)
        like = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.n = 0.0
        self.x = like.new_zeros(self.groups, d)
        self.g = like.new_zeros(n)
        self.xg, self.x_fired = like.new_zeros(n, d), like.new_zeros(n, d)
        self.x_all = None if gram else like.new_zeros(n, d)
        self.wants_gram = gram
        self.gram: Tensor | None = None  # of patches that were unfolded; the others are in lags
        self.lags: Autocorrelation | None = None
        self.shift: tuple[Tensor, Tensor] | None = None
        self.seen = False
        self.unfinished: list[_Work] = []
        self.finite = torch.ones((), dtype=torch.bool, device=like.device)
        """Whether every input and output was, so far."""

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch: ``x`` the layer's input, ``y`` its output with bias, before any nonlinearity.

        Raises:
            torch.OutOfMemoryError: where the memory that is left is too small for a single image; :meth:`finish` goes
                on from there, once there is more.
        """
        if not self.geometry.kernel:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if not self.seen:
            self.seen, self.shift = True, _shift(x, y)
            if self.shift is not None or self.geometry.padding_mode != "zeros":
                self.geometry = self.geometry.unpadded()
        values = 3 * y[0].numel() + 2 * x[0].numel()
        drawn = sampled_positions(self.positions, y[0, 0].numel())
        if drawn or (self.wants_gram and not applies(self.geometry, x.shape[1], tuple(x.shape[2:]))):
            values += (drawn or y[0, 0].numel()) * self.x.numel()
        # About a shift, temporaries are float64.
        images = max(1, self.memory // (values * (x.element_size() if self.shift is None else 8)))
        for part, output in zip(x.split(images), y.split(images), strict=True):
            where = drawn and draw_positions(len(part), y[0, 0].numel(), drawn, self.generator)
            self.unfinished.append(_Work(part, output, where))
        self.finish()

    @torch.no_grad()
    def finish(self) -> bool:
        """Adds what an ``add`` found no memory for; whether there was anything.

        Where the memory is too small for one of the sums, it and those after it are taken over half of the images at a
        time.

        Raises:
            torch.OutOfMemoryError: as :meth:`add`.
        """
        there = bool(self.unfinished)
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
        return there

    def _add(self, work: _Work) -> None:
        for part in itertools.islice(self._sums(work.x, work.y, work.drawn), work.done, None):
            part()
            work.done += 1

    def _sums(self, x: Tensor, y: Tensor, drawn: Tensor | int) -> Iterator[Callable[[], None]]:
        """What a batch adds to each sum, one after the other; each adds all of it, or runs out of memory before."""
        if not self.geometry.pads:
            x = pad(x, geometry_of(self.layer))
        gate = torch.gt(y, 0, out=self.scratch.like("gate", y))
        # -Inf has no trace in the sums: its gate is closed.
        self.finite &= torch.isfinite(y.sum())
        if self.shift is not None:
            # In float64: padding lies as far from the mean as the mean is large, and its products have to cancel.
            x, y = (t.double() - _along(c, t) for t, c in zip((x, y), self.shift, strict=True))
            gate = gate.double()
        if isinstance(drawn, int):
            yield from self._map_sums(
                y, gate, lambda: patch_sum(x, self.geometry), lambda maps: cross_sum(x, maps, self.geometry)
            )
            if self.wants_gram:
                yield from self._gram_sums(x)
            return
        there, positions = y[0, 0].numel(), drawn.to(x.device)
        scale = there / positions.shape[1]
        p = patches_at(x, self.geometry, positions)
        # One image of B·M positions, (1, N, B·M).
        index = positions[:, None].expand(-1, y.shape[1], -1)
        y, gate = (t.flatten(2).gather(2, index).transpose(0, 1).reshape(1, y.shape[1], -1) for t in (y, gate))

        def product(maps: Tensor) -> Tensor:
            return scale * (maps.view(self.groups, -1, maps.shape[2]) @ p).flatten(0, 1)

        yield from self._map_sums(y, gate, lambda: scale * p.sum(1, dtype=torch.float64), product, scale)
        if self.wants_gram:
            yield from self._product_sums(p, scale)

    def _map_sums(
        self,
        y: Tensor,
        gate: Tensor,
        patch: Callable[[], Tensor],
        cross: Callable[[Tensor], Tensor],
        scale: float = 1.0,
    ) -> Iterator[Callable[[], None]]:
        """The sums of patches, ``patch`` (G, D), and of their products with the maps of the gate, through ``cross``."""

        def plain() -> None:
            x = patch()
            self.finite &= torch.isfinite(x).all()
            fired = gate.flatten(2).sum(2).sum(0, dtype=torch.float64) if y.ndim > 2 else gate.sum(0)
            fired = scale * fired
            self.n += scale * (y.numel() // y.shape[1])
            self.x += x
            self.g += fired

        yield plain
        yield lambda: self._accumulate(self.xg, cross(gate))

        def active() -> None:
            # y times its gate; about zero, this is its positive part.
            fired = self.scratch.like("fired", y)
            fired = torch.clamp_min(y, 0, out=fired) if self.shift is None else torch.mul(y, gate, out=fired)
            self._accumulate(self.x_fired, cross(fired))

        yield active
        if self.x_all is not None:
            every = self.x_all
            yield lambda: self._accumulate(every, cross(y))

    def _gram_sums(self, x: Tensor) -> Iterator[Callable[[], None]]:
        if applies(self.geometry, x.shape[1], tuple(x.shape[2:])):
            if self.lags is None:
                self.lags = Autocorrelation(self.geometry, x.shape[1], self.x, self.scratch)
            yield partial(self.lags.add, x)
        else:
            yield from self._product_sums(patches(x, self.geometry))

    def _accumulate(self, total: Tensor, part: Tensor) -> None:
        total.add_(self.scratch.like("wide", total).view(part.shape).copy_(part).view_as(total))

    def _product_sums(self, p: Tensor, scale: float = 1.0) -> Iterator[Callable[[], None]]:
        """Σ x xᵀ over patches (G, samples, D), some of its rows at a time: for D = 25,088 it has 5 GB."""
        groups, _, d = p.shape
        gram = self.gram = self.x.new_zeros(groups, d, d) if self.gram is None else self.gram

        def rows(part: slice) -> None:
            product = self.scratch.like("product", p, (groups, len(range(d)[part]), d))
            gram[:, part].add_(torch.matmul(p[:, :, part].mT, p, out=product), alpha=scale)

        step = max(1, self.memory // (12 * groups * d))
        for start in range(0, d, step):
            yield partial(rows, slice(start, start + step))

    def _whole_gram(self) -> Tensor | None:
        if not self.wants_gram:
            return None
        if self.lags is None:
            return self.x.new_zeros(*self.x.shape, self.x.shape[1]) if self.gram is None else self.gram.clone()
        correlated = self.lags.gram()
        return correlated if self.gram is None else correlated.add_(self.gram)

    def state(self) -> dict[str, Tensor]:
        """The sums as they are, for :meth:`restore`: going on from them gives the same to the bit."""
        state = {"n": self.x.new_tensor(self.n), "x": self.x, "g": self.g, "xg": self.xg, "x_fired": self.x_fired}
        state["generator"] = self.generator.get_state()
        if self.x_all is not None:
            state["x_all"] = self.x_all
        if self.gram is not None:
            state["gram"] = self.gram
        if self.shift is not None:
            state["shift_x"], state["shift_y"] = self.shift
        if self.lags is not None:
            state |= {f"lags/{name}": tensor for name, tensor in self.lags.sums().items()}
        return state if self.seen else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the ``state`` of a collector of the same layer and settings."""
        if not state:
            return
        here = {name: tensor.to(self.x.device, copy=True) for name, tensor in state.items() if name != "generator"}
        self.seen, self.n = True, float(state["n"])
        self.generator.set_state(state["generator"])
        self.x, self.g, self.xg, self.x_fired = here["x"], here["g"], here["xg"], here["x_fired"]
        self.x_all, self.gram = here.get("x_all"), here.get("gram")
        if "shift_x" in here:
            self.shift = here["shift_x"], here["shift_y"]
        if self.shift is not None or self.geometry.padding_mode != "zeros":
            self.geometry = self.geometry.unpadded()
        lags = {name.removeprefix("lags/"): tensor for name, tensor in here.items() if name.startswith("lags/")}
        if lags:
            self.lags = Autocorrelation(self.geometry, lags["full"].shape[0], self.x, self.scratch)
            self.lags.restore(lags)

    def moments(self) -> Moments:
        """The sums so far, about zero whatever they were taken about, on the device that they were taken on: the layer
        may have been moved since, as Lightning moves a network back to the CPU when a loop ends."""
        layer, n = self.layer, self.x.new_tensor(self.n)
        weight = layer.weight.detach().to(self.x.device).flatten(1).double()
        per_neuron = len(weight) // self.groups
        # What was summed is x - c and y - m, with y = wᵀx + bias; so u = (y - m) + back.
        c = torch.zeros_like(self.x) if self.shift is None else _patch_of(self.shift[0], layer)
        back = torch.zeros_like(self.g) if self.shift is None else self.shift[1].double()
        back = back if layer.bias is None else back - layer.bias.detach().to(back.device).double()
        about = c.repeat_interleave(per_neuron, 0)
        x = self.x.repeat_interleave(per_neuron, 0)
        offset = (weight * about).sum(1)
        xug = self.x_fired + back[:, None] * self.xg
        gram = self._whole_gram()
        if gram is not None:
            xu = (weight.view(self.groups, -1, weight.shape[1]) @ gram).view_as(weight) + offset[:, None] * x
            xun = xu - xug
        if self.x_all is not None:
            xun = self.x_all - self.x_fired + back[:, None] * (x - self.xg)
        ug = (weight * self.xg).sum(1) + offset * self.g
        un = (weight * x).sum(1) + offset * n - ug
        xug, xun = xug + about * ug[:, None], xun + about * un[:, None]
        if gram is not None and self.shift is not None:
            for one, other in ((c, self.x), (self.x, c), (n * c, c)):
                gram.baddbmm_(one[:, :, None], other[:, None, :])
        return Moments(
            n=n,
            x=self.x + n * c,
            g=self.g.clone(),
            ug=ug,
            un=un,
            uug=(weight * xug).sum(1),
            uun=(weight * xun).sum(1),
            xg=self.xg + about * self.g[:, None],
            xug=xug,
            xun=xun,
            gram=gram,
        )


def _shift(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Means per channel of input and output, where an input's is so large that float32 products would cancel."""
    axes = [i for i in range(x.ndim) if i != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    if not (mean.abs() > LARGE_MEAN * variance.sqrt()).logical_and(mean != 0).any():
        return None
    return mean.to(x.dtype), y.mean([i for i in range(y.ndim) if i != 1])


def _along(channel: Tensor, like: Tensor) -> Tensor:
    return channel.view(-1, *[1] * (like.ndim - 2))


def _patch_of(channel: Tensor, layer: Layer) -> Tensor:
    """The patch (G, D) of an input that is constant in each channel."""
    taps = layer.weight[0, 0].numel()
    return channel.double().repeat_interleave(taps).view(geometry_of(layer).groups, -1)
