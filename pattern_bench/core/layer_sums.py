"""Add batches of a layer's inputs and outputs to its running sums, at the price of a few forward passes.

Per batch, convolution weight gradients give the cross-moments (of x with the gate, and with the positive and the
negative part of y), and the autocorrelation of the input gives the Gram matrix; with it, Σ x u = (Σ x xᵀ) w is known,
and the negative part is left out but for neurons that nearly always fire. Small patches and sampled positions are
unfolded, and everything is a matrix product. The rest follows from identities, because u = wᵀx: Σ u g = wᵀ Σ x g and
Σ u² g = wᵀ Σ x u g.

A sum over few samples is never left to be the difference of two sums over many: it would be nothing but rounding.

Shapes: B images, C input channels, G groups, D values of a patch, N neurons, M positions drawn from each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pattern_bench.core import small_patches
from pattern_bench.core.gram import Autocorrelation, autocorrelation_applies, is_small_patch
from pattern_bench.core.layers import (
    Layer,
    Scratch,
    convolved,
    cross_sum,
    geometry_of,
    neurons,
    pad,
    patch_size,
    patch_sum,
    patches,
    patches_at,
)
from pattern_bench.core.moments import Moments

OFTEN = 0.9
"""The sums over the patches where a neuron does not fire are taken directly where it fires for more than this share."""
ROUNDING = 1e-12
"""Below this share of what was subtracted, a difference of float64 sums is zero."""


@dataclass(frozen=True)
class _Maps:
    """A batch's output y and gate (B, N, positions...), and the functions that sum its patches.

    ``exact`` tells that y and the gate are float64, with y = wᵀx + b computed anew and the network's own gate. ``sum``
    returns Σ x (G, D), ``cross`` Σ t ⊗ x for maps t like y; both scaled by ``scale``, the positions for each one drawn.
    """

    y: Tensor
    gate: Tensor
    exact: bool
    sum: Callable[[], Tensor]
    cross: Callable[[Tensor], Tensor]
    scale: float = 1.0


class LayerSums:
    """Running sums of one layer in float64, and the steps that add a batch to them.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        gram: whether to sum the Gram matrix too.
        memory: bytes that the largest temporary may take.
        scratch: memory for temporaries.

    >>> layer = torch.nn.Linear(1, 1)
    >>> sums, x = LayerSums(layer, True, 2**20, Scratch()), torch.tensor([[1.0], [3.0]])
    >>> with torch.no_grad():
    ...     for step in sums.steps(x, layer(x), drawn=0, exact=True):
    ...         step()
    >>> sums.n, sums.x.item(), sums.moments().gram.item()
    (2.0, 4.0, 10.0)
    """

    def __init__(self, layer: Layer, gram: bool, memory: int, scratch: Scratch) -> None:
        self.layer, self.memory, self.scratch = layer, memory, scratch
        geometry = geometry_of(layer)
        self.geometry = geometry if geometry.padding_mode == "zeros" else geometry.unpadded()
        self.groups = self.geometry.groups
        n, d = neurons(layer), patch_size(layer)
        like = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.small = is_small_patch(d)
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
        self.finite = torch.ones((), dtype=torch.bool, device=like.device)
        """Whether all inputs and outputs were finite."""

    def steps(self, x: Tensor, y: Tensor, drawn: Tensor | int, exact: bool) -> Iterator[Callable[[], None]]:
        """Yield what adds a batch to each sum, one after the other; a step adds all of it, or nothing where memory runs
        out.

        Args:
            x: (B, C, spatial...), the layer's input in at least float32; (B, C) for a Linear layer.
            y: (B, N, output spatial...), its output with bias.
            drawn: (B, M), the positions to take from each image; 0 for all.
            exact: whether to take products in float64.
        """
        if not self.geometry.pads:
            x = pad(x, geometry_of(self.layer))
        # -Inf has no trace in the sums: its gate is closed.
        self.finite &= torch.isfinite(y.sum())
        if self.small and isinstance(drawn, int):
            yield partial(self._add_small_patches, x, y)
            return
        gate = torch.gt(y, 0, out=self.scratch.like("gate", y))
        if exact:
            x, gate = x.double(), gate.double()
        if isinstance(drawn, int):
            if exact:
                y = convolved(x, *self._parameters(), self.geometry)
            maps = _Maps(
                y, gate, exact, lambda: patch_sum(x, self.geometry), lambda maps: cross_sum(x, maps, self.geometry)
            )
            yield from self._map_steps(maps)
            if self.wants_gram:
                yield from self._gram_steps(x)
            return
        yield from self._drawn_steps(x, y, gate, drawn, exact)

    def state(self) -> dict[str, Tensor]:
        """Return the sums as they are, for :meth:`restore`; empty before the first batch."""
        state = {"n": self.x.new_tensor(self.n), "x": self.x, "g": self.g, "xg": self.xg, "x_fired": self.x_fired}
        if self.gram is not None:
            state["gram"] = self.gram
        if self.direct is not None and self.x_rested is not None:
            state["direct"], state["x_rested"] = self.direct, self.x_rested
        if self.lags is not None:
            state |= {f"lags/{name}": tensor for name, tensor in self.lags.sums().items()}
        return state if self.n else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by the :meth:`state` of others, not empty, of the same layer and settings."""
        own = {name: tensor.to(self.x.device, copy=True) for name, tensor in state.items()}
        self.n = float(state["n"])
        self.x, self.g, self.xg, self.x_fired = own["x"], own["g"], own["xg"], own["x_fired"]
        self.direct, self.x_rested, self.gram = own["direct"], own["x_rested"], own.get("gram")
        lags = {name.removeprefix("lags/"): tensor for name, tensor in own.items() if name.startswith("lags/")}
        if lags:
            self.lags = Autocorrelation(self.geometry, lags["full"].shape[0], self.x, self.scratch)
            self.lags.restore(lags)

    def moments(self) -> Moments:
        """Return the moments, on the device that the sums were taken on."""
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

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return the layer's weight and bias in float64."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        return weight.to(self.x), None if bias is None else bias.detach().to(self.x)

    def _whole_gram(self) -> Tensor | None:
        if not self.wants_gram:
            return None
        if self.lags is None:
            return self.x.new_zeros(*self.x.shape, self.x.shape[1]) if self.gram is None else self.gram.clone()
        correlated = self.lags.gram()
        return correlated if self.gram is None else correlated.add_(self.gram)

    # --- small patches, and positions that were drawn ---

    def _add_small_patches(self, x: Tensor, y: Tensor) -> None:
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

    def _drawn_steps(
        self, x: Tensor, y: Tensor, gate: Tensor, drawn: Tensor, exact: bool
    ) -> Iterator[Callable[[], None]]:
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

        def cross(maps: Tensor) -> Tensor:
            return scale * (maps.view(self.groups, -1, maps.shape[2]) @ p).flatten(0, 1)

        yield from self._map_steps(_Maps(y, gate, exact, lambda: scale * p.sum(1, dtype=torch.float64), cross, scale))
        if self.wants_gram:
            yield from self._product_steps(p, scale)

    # --- sums of patches, and of their products with the gate and the output ---

    def _map_steps(self, maps: _Maps) -> Iterator[Callable[[], None]]:
        yield partial(self._add_gated, maps)
        yield partial(self._add_fired, maps)
        yield partial(self._add_rested, maps)

    def _add_gated(self, maps: _Maps) -> None:
        """Add n, Σ x, Σ g and Σ x g. For neurons that nearly always fire, Σ x (1-g) is taken and subtracted."""
        gate, y = maps.gate, maps.y
        count = maps.scale * (y.numel() // y.shape[1])
        x = maps.sum()
        self.finite &= torch.isfinite(x).all()
        fired = gate.flatten(2).sum(2).sum(0, dtype=torch.float64) if y.ndim > 2 else gate.sum(0)
        fired = maps.scale * fired
        nearly_always = fired > OFTEN * count
        often = nearly_always.nonzero().squeeze(1)
        turned = nearly_always.to(gate.dtype).view(-1, *[1] * (gate.ndim - 2))
        if len(often):
            gate.ne_(turned)  # open where those rest
        sums = self._wide(maps.cross(gate), self.xg)
        if len(often):
            sums[often] = x[often // (len(fired) // self.groups)] - sums[often]
            if maps.exact:
                gate.ne_(turned)
        if self.direct is None:
            self.direct = often if self.groups == 1 or not len(often) else torch.arange(len(fired)).to(often)
            self.x_rested = self.xg.new_zeros(len(self.direct), self.xg.shape[1])
        self.n += count
        self.x += x
        self.g += fired
        self.xg += sums

    def _add_fired(self, maps: _Maps) -> None:
        """Add Σ x y g: y times its gate is its positive part, but where the gate is of other digits than y."""
        fired = self.scratch.like("fired", maps.y)
        fired = torch.mul(maps.y, maps.gate, out=fired) if maps.exact else torch.clamp_min(maps.y, 0, out=fired)
        self.x_fired += self._wide(maps.cross(fired), self.x_fired)

    def _add_rested(self, maps: _Maps) -> None:
        """Add Σ x y (1-g) for the neurons whose sum the Gram matrix does not give well."""
        if self.direct is None or self.x_rested is None or not len(self.direct):
            return
        y, gate = maps.y, maps.gate
        every = len(self.direct) == y.shape[1]
        rested = self.scratch.like("fired", y) if every else y[:, self.direct]
        if maps.exact:
            shut = 1 - (gate if every else gate[:, self.direct])
            rested = torch.mul(y if every else rested, shut, out=rested)
        else:
            rested = torch.clamp_max(y if every else rested, 0, out=rested)
        self.x_rested += self._wide(maps.cross(rested), self.x_rested)

    def _wide(self, part: Tensor, like: Tensor) -> Tensor:
        """Return ``part`` in float64, in ``like``'s shape; the caller's until the next call."""
        return self.scratch.like("wide", like).view(part.shape).copy_(part).view_as(like)

    # --- the Gram matrix ---

    def _gram_steps(self, x: Tensor) -> Iterator[Callable[[], None]]:
        if autocorrelation_applies(self.geometry, x.shape[1], tuple(x.shape[2:])):
            if self.lags is None:
                self.lags = Autocorrelation(self.geometry, x.shape[1], self.x, self.scratch)
            yield partial(self.lags.add, x)
        else:
            yield from self._product_steps(patches(x, self.geometry))

    def _product_steps(self, p: Tensor, scale: float = 1.0) -> Iterator[Callable[[], None]]:
        """Yield steps that add Σ x xᵀ over patches (G, samples, D), some rows each: for D = 25,088 it has 5 GB."""
        groups, _, d = p.shape
        gram = self.gram = self.x.new_zeros(groups, d, d) if self.gram is None else self.gram

        def rows(part: slice) -> None:
            product = self.scratch.like("product", p, (groups, len(range(d)[part]), d))
            gram[:, part].add_(torch.matmul(p[:, :, part].mT, p, out=product), alpha=scale)

        step = max(1, self.memory // (12 * groups * d))
        for start in range(0, d, step):
            yield partial(rows, slice(start, start + step))
