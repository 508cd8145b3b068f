"""Streams a layer's inputs and outputs into its moments, at the price of a few forward passes.

Per batch, convolution weight gradients give the cross-moments (of x with the gate, and with the positive and the
negative part of y), and the autocorrelation of the input gives the Gram matrix; with it, Σ x u = (Σ x xᵀ) w is known,
and the negative part is left out but for neurons that nearly always fire. Small patches and sampled positions are
unfolded, and everything is a matrix product. The rest follows from identities, because u = wᵀx: Σ u g = wᵀ Σ x g and
Σ u² g = wᵀ Σ x u g.

A sum over few samples is never left to be the difference of two sums over many: it would be nothing but rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pattern_bench.core import small_patches
from pattern_bench.core.cancellation import cancels
from pattern_bench.core.gram import Autocorrelation, applies, is_small
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layers import (
    Layer,
    Scratch,
    convolved,
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

OFTEN = 0.9
"""A neuron that fires for a larger share of the samples has its sums over the few others taken by themselves."""
ROUNDING = 1e-12
"""Below this share of what was subtracted, a difference of float64 sums is zero."""
LEAST_POSITIONS = 256
"""Sampling leaves at least so many output positions of an image."""


def sampled_positions(share: float, there: int) -> int:
    """Output positions to draw from each image; 0 where all that are there are taken."""
    count = max(LEAST_POSITIONS, round(share * there))
    return count if share < 1 and count < there else 0


@dataclass
class _Work:
    """Images on their way into the sums: a layer's input and output, the positions drawn from each image (0: all),
    whether products are taken in float64, and how many of the sums have them already."""

    x: Tensor
    y: Tensor
    drawn: Tensor | int
    exact: bool
    done: int = 0

    def images(self, part: slice) -> _Work:
        drawn = self.drawn if isinstance(self.drawn, int) else self.drawn[part]
        return _Work(self.x[part], self.y[part], drawn, self.exact, self.done)


class Collector:
    """Sums of one layer over a stream of batches.

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
        geometry = geometry_of(layer)
        self.geometry = geometry if geometry.padding_mode == "zeros" else geometry.unpadded()
        self.groups = self.geometry.groups
        n, d = neurons(layer), patch_size(layer)
        like = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.small = is_small(d)
        self.n = 0.0
        self.x = like.new_zeros(self.groups, d)
        self.g = like.new_zeros(n)
        self.xg, self.x_fired = like.new_zeros(n, d), like.new_zeros(n, d)
        self.wants_gram = gram
        # Neurons whose sums of x times the negative part of y are taken (None until the first batch tells), and these.
        self.direct = None if gram and not self.small else torch.arange(n, device=like.device)
        self.x_rested = None if self.direct is None else like.new_zeros(n, d)
        self.gram: Tensor | None = None  # of patches that were unfolded; the others are in lags
        self.lags: Autocorrelation | None = None
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
        x, y = wide(x), wide(y)
        if not self.geometry.kernel:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        exact = self.small or cancels(x)
        drawn = sampled_positions(self.positions, y[0, 0].numel())
        values = 3 * y[0].numel() + 2 * x[0].numel()
        if exact or drawn or (self.wants_gram and not applies(self.geometry, x.shape[1], tuple(x.shape[2:]))):
            values += (drawn or y[0, 0].numel()) * self.x.numel()
        images = max(1, self.memory // (values * (8 if exact else x.element_size())))
        for part, output in zip(x.split(images), y.split(images), strict=True):
            where = drawn and draw_positions(len(part), y[0, 0].numel(), drawn, self.generator)
            self.unfinished.append(_Work(part, output, where, exact))
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
        for part in itertools.islice(self._sums(work), work.done, None):
            part()
            work.done += 1

    def _sums(self, work: _Work) -> Iterator[Callable[[], None]]:
        """What a batch adds to each sum, one after the other; each adds all of it, or runs out of memory before."""
        x, y = work.x, work.y
        if not self.geometry.pads:
            x = pad(x, geometry_of(self.layer))
        # -Inf has no trace in the sums: its gate is closed.
        self.finite &= torch.isfinite(y.sum())
        if self.small and isinstance(work.drawn, int):
            yield partial(self._small_sums, x, y)
            return
        gate = torch.gt(y, 0, out=self.scratch.like("gate", y))
        if work.exact:
            x, gate = x.double(), gate.double()
        if isinstance(work.drawn, int):
            if work.exact:
                y = convolved(x, *self._parameters(), self.geometry)
            yield from self._map_sums(
                y, gate, work.exact, lambda: patch_sum(x, self.geometry), lambda maps: cross_sum(x, maps, self.geometry)
            )
            if self.wants_gram:
                yield from self._gram_sums(x)
            return
        yield from self._drawn_sums(x, y, gate, work.drawn, work.exact)

    def _small_sums(self, x: Tensor, y: Tensor) -> None:
        """The same for small patches, all of them, in one step."""
        weight, bias = self._parameters()
        bias = torch.zeros_like(self.g) if bias is None else bias
        x, geometry = pad(x, self.geometry), self.geometry.unpadded()
        sums = small_patches.sums_of(x, y, weight.flatten(1), geometry, self.wants_gram, self.scratch, self.memory)
        rests = sums.x.repeat_interleave(len(weight) // self.groups, 0) - sums.xg
        fired, rested = sums.xug + bias[:, None] * sums.xg, sums.xun + bias[:, None] * rests
        finite = self.finite & torch.isfinite(sums.x).all()
        # From here on nothing needs memory.
        self.finite = finite
        self.n += y.numel() // y.shape[1]
        self.x += sums.x
        self.g += sums.g
        self.xg += sums.xg
        self.x_fired += fired
        self.x_rested = rested if self.x_rested is None else self.x_rested.add_(rested)
        if sums.gram is not None:
            self.gram = sums.gram if self.gram is None else self.gram.add_(sums.gram)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias in float64."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        return weight.to(self.x), None if bias is None else bias.detach().to(self.x)

    def _drawn_sums(
        self, x: Tensor, y: Tensor, gate: Tensor, drawn: Tensor, exact: bool
    ) -> Iterator[Callable[[], None]]:
        """The same from the patches at the positions that were drawn."""
        y, gate = y.flatten(2), gate.flatten(2)
        scale, drawn = y[0, 0].numel() / drawn.shape[1], drawn.to(x.device)
        p = patches_at(x, self.geometry, drawn)
        y, gate = (t.gather(2, drawn[:, None].expand(-1, t.shape[1], -1)) for t in (y, gate))
        # One image of B·M positions, (1, N, B·M).
        y, gate = (t.transpose(0, 1).reshape(1, t.shape[1], -1) for t in (y, gate))
        if exact:
            weight, bias = self._parameters()
            y = (weight.reshape(self.groups, -1, p.shape[2]) @ p.mT).view_as(gate)
            y = y if bias is None else y.add_(bias[:, None])

        def product(maps: Tensor) -> Tensor:
            return scale * (maps.view(self.groups, -1, maps.shape[2]) @ p).flatten(0, 1)

        yield from self._map_sums(y, gate, exact, lambda: scale * p.sum(1, dtype=torch.float64), product, scale)
        if self.wants_gram:
            yield from self._product_sums(p, scale)

    def _map_sums(
        self,
        y: Tensor,
        gate: Tensor,
        exact: bool,
        patch: Callable[[], Tensor],
        cross: Callable[[Tensor], Tensor],
        scale: float = 1.0,
    ) -> Iterator[Callable[[], None]]:
        """The sums of patches, ``patch`` (G, D), and of their products with the maps of the gate, through ``cross``."""
        count = scale * (y.numel() // y.shape[1])

        def plain() -> None:
            x = patch()
            self.finite &= torch.isfinite(x).all()
            fired = gate.flatten(2).sum(2).sum(0, dtype=torch.float64) if y.ndim > 2 else gate.sum(0)
            fired = scale * fired
            nearly_always = fired > OFTEN * count
            often = nearly_always.nonzero().squeeze(1)
            turned = nearly_always.to(gate.dtype).view(-1, *[1] * (gate.ndim - 2))
            if len(often):
                gate.ne_(turned)  # open where those rest
            sums = self._wide(cross(gate), self.xg)
            if len(often):
                sums[often] = x[often // (len(fired) // self.groups)] - sums[often]
                if exact:
                    gate.ne_(turned)
            if self.direct is None:
                self.direct = often if self.groups == 1 or not len(often) else torch.arange(len(fired)).to(often)
                self.x_rested = self.xg.new_zeros(len(self.direct), self.xg.shape[1])
            self.n += count
            self.x += x
            self.g += fired
            self.xg += sums

        yield plain

        def active() -> None:
            # y times its gate, which is its positive part but where the gate is of other digits than y.
            fired = self.scratch.like("fired", y)
            fired = torch.mul(y, gate, out=fired) if exact else torch.clamp_min(y, 0, out=fired)
            self.x_fired += self._wide(cross(fired), self.x_fired)

        yield active

        def resting() -> None:
            if self.direct is None or self.x_rested is None or not len(self.direct):
                return
            every = len(self.direct) == y.shape[1]
            rested = self.scratch.like("fired", y) if every else y[:, self.direct]
            if exact:
                shut = 1 - (gate if every else gate[:, self.direct])
                rested = torch.mul(y if every else rested, shut, out=rested)
            else:
                rested = torch.clamp_max(y if every else rested, 0, out=rested)
            self.x_rested += self._wide(cross(rested), self.x_rested)

        yield resting

    def _gram_sums(self, x: Tensor) -> Iterator[Callable[[], None]]:
        if applies(self.geometry, x.shape[1], tuple(x.shape[2:])):
            if self.lags is None:
                self.lags = Autocorrelation(self.geometry, x.shape[1], self.x, self.scratch)
            yield partial(self.lags.add, x)
        else:
            yield from self._product_sums(patches(x, self.geometry))

    def _wide(self, part: Tensor, like: Tensor) -> Tensor:
        """``part`` in float64, in ``like``'s shape; the caller's until the next call."""
        return self.scratch.like("wide", like).view(part.shape).copy_(part).view_as(like)

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
        if self.gram is not None:
            state["gram"] = self.gram
        if self.direct is not None and self.x_rested is not None:
            state["direct"], state["x_rested"] = self.direct, self.x_rested
        if self.lags is not None:
            state |= {f"lags/{name}": tensor for name, tensor in self.lags.sums().items()}
        return state if self.n else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the ``state`` of a collector of the same layer and settings."""
        if not state:
            return
        here = {name: tensor.to(self.x.device, copy=True) for name, tensor in state.items() if name != "generator"}
        self.n = float(state["n"])
        self.generator.set_state(state["generator"])
        self.x, self.g, self.xg, self.x_fired = here["x"], here["g"], here["xg"], here["x_fired"]
        self.direct, self.x_rested, self.gram = here["direct"], here["x_rested"], here.get("gram")
        lags = {name.removeprefix("lags/"): tensor for name, tensor in here.items() if name.startswith("lags/")}
        if lags:
            self.lags = Autocorrelation(self.geometry, lags["full"].shape[0], self.x, self.scratch)
            self.lags.restore(lags)

    def moments(self) -> Moments:
        """The sums so far, on the device that they were taken on: the layer may have been moved since, as Lightning
        moves a network back to the CPU when a loop ends."""
        weight, bias = self._parameters()
        weight = weight.flatten(1)
        bias = torch.zeros_like(self.g) if bias is None else bias
        x = self.x.repeat_interleave(len(weight) // self.groups, 0)
        rests = x - self.xg
        rests = rests.where(rests.abs() > ROUNDING * x.abs(), 0.0)
        xg = x - rests
        # What was summed is y = wᵀx + bias.
        xug = self.x_fired - bias[:, None] * xg
        gram = self._whole_gram()
        xun, xu = torch.zeros_like(xug), None
        if gram is not None and not self.small:
            xu = (weight.view(self.groups, -1, weight.shape[1]) @ gram).view_as(weight)
            xun = xu - xug
        if self.direct is not None and self.x_rested is not None:
            xun[self.direct] = self.x_rested - bias[self.direct, None] * rests[self.direct]
            if xu is not None:
                xug[self.direct] = xu[self.direct] - xun[self.direct]
        return Moments(
            n=self.x.new_tensor(self.n),
            x=self.x.clone(),
            g=self.g.clone(),
            ug=(weight * xg).sum(1),
            un=(weight * rests).sum(1),
            uug=(weight * xug).sum(1),
            uun=(weight * xun).sum(1),
            xg=xg,
            xug=xug,
            xun=xun,
            gram=gram,
        )
