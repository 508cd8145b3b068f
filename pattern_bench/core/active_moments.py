"""Compute ρ(S) where a neuron fires (the criterion ``positive``), in closed form.

Only samples with g = 1[y > 0] = 1 count, so every neuron has a Gram matrix of its own, Σ g x xᵀ. That is too much for
all neurons of a wide layer, and little for some, from which the layer's mean is known well enough. With it, a neuron is
a layer of its own that always fires, and ``core/probe_closed_form.py`` does the rest.

Shapes: B images, C input channels, D values of a patch, N neurons of a layer, K of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pattern_bench.core.cancellation import cancels
from pattern_bench.core.collector import sampled_positions
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.gram import is_small_patch
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layers import Layer, draw_positions, geometry_of, patch_size, patches, patches_at
from pattern_bench.core.memory import HalfDoneError, is_out_of_memory
from pattern_bench.core.moments import MEMORY, Moments
from pattern_bench.core.probe_closed_form import Probe, rho


def draw_neurons(neurons: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of ``neurons``, or all of them where they are fewer, in order: (K,) int64.

    >>> draw_neurons(3, 8, torch.Generator())
    tensor([0, 1, 2])
    """
    return torch.randperm(neurons, generator=generator)[:count].sort().values


@dataclass
class FiringMoments:
    """Sums over the patches x of one layer at which each of K neurons fires.

    >>> sums = torch.tensor([[[5.0, 3.0], [3.0, 2.0]]], dtype=torch.float64)  # of the patches 1 and 2
    >>> FiringMoments(sums).moments_of(0, torch.tensor([1.0], dtype=torch.float64)).mean_u.item()
    1.5
    """

    sums: Tensor
    """Σ g (x, 1)(x, 1)ᵀ for each neuron, (K, D + 1, D + 1) float64; the last entry counts the patches."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for files and reductions over processes."""
        return {"sums": self.sums}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FiringMoments:
        """Return the moments with these sums, the inverse of :meth:`tensors`.

        Raises:
            ValueError: where they are not K square matrices in float64 whose corners are counts.
        """
        if tensors.keys() != {"sums"}:
            raise ValueError(f"moments of firing neurons have sums alone, not {', '.join(sorted(tensors))}")
        sums = tensors["sums"]
        if sums.dtype != torch.float64 or sums.ndim != 3 or sums.shape[1] != sums.shape[2] or sums.shape[1] < 2:
            raise ValueError(f"moments of firing neurons have the shape {tuple(sums.shape)} and are {sums.dtype}")
        if not bool((sums[:, -1, -1] >= 0).all()):
            raise ValueError("moments of firing neurons count fewer than no patches")
        return cls(sums)

    def to(self, device: torch.device | str) -> FiringMoments:
        """Return the same sums on another device."""
        return FiringMoments(self.sums.to(device))

    def times(self, weight: float) -> FiringMoments:
        """Return the sums as if every patch occurred ``weight`` times."""
        return FiringMoments(weight * self.sums)

    def add_(self, other: FiringMoments) -> FiringMoments:
        """Add the sums of other patches, for the same neurons, in place."""
        self.sums.add_(other.sums)
        return self

    def moments_of(self, index: int, weight: Tensor) -> Moments:
        """Return the moments of a layer with one neuron, which has seen only the patches at which that fires.

        Args:
            index: the neuron's, among the K.
            weight: (D,), float64.
        """
        sums = self.sums[index]
        n, x, gram = sums[-1, -1], sums[None, -1, :-1], sums[None, :-1, :-1]
        xu = (gram[0] @ weight)[None]
        zero, zeros = torch.zeros_like(n)[None], torch.zeros_like(xu)
        return Moments(
            n=n, x=x, g=n[None], ug=x @ weight, un=zero, uug=xu @ weight, uun=zero, xg=x, xug=xu, xun=zeros, gram=gram
        )


class FiringCollector:
    """Collect the moments of some neurons over the patches at which they fire, batch by batch.

    Products are taken in the precision of the activations, or in float64 where :class:`Collector` takes them so, and
    sums in float64.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        neurons: (K,), indices.
        memory: bytes that the unfolded patches of a batch may take; its images are taken in parts.
        positions: share of each image's output positions to use, as of :class:`Collector`.
        seed: of the positions.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> collector, x = FiringCollector(layer, torch.tensor([0])), torch.tensor([[1.0], [2.0], [-3.0]])
    >>> collector.add(x, layer(x))
    >>> collector.moments().sums.tolist()
    [[[5.0, 3.0], [3.0, 2.0]]]
    """

    def __init__(
        self, layer: Layer, neurons: Tensor, memory: int = MEMORY, positions: float = 1.0, seed: int = 0
    ) -> None:
        self.neurons, self.memory, self.positions = neurons.tolist(), memory, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.geometry, size = geometry_of(layer), patch_size(layer)
        self.groups = [neuron // (len(layer.weight) // self.geometry.groups) for neuron in self.neurons]
        like = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.sums = like.new_zeros(len(neurons), size + 1, size + 1)
        self.small = is_small_patch(size)
        self.finite = torch.ones((), dtype=torch.bool, device=like.device)
        """Whether all inputs and outputs were finite, () bool."""

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: the layer's input, (B, C, spatial...); (..., C) for a Linear layer.
            y: its output with bias, before any nonlinearity, (B, N, output spatial...); (..., N) for a Linear layer.

        Raises:
            HalfDoneError: where there is no memory for it. A part of it may have been added, so the sums are of no more
                use.
        """
        x, y = wide(x), wide(y)
        self.finite &= torch.isfinite(x.sum()) & torch.isfinite(y.sum())
        if not self.geometry.kernel:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        every = y[0, 0].numel()
        drawn = sampled_positions(self.positions, every)
        values = (drawn or every) * self.geometry.groups * self.sums.shape[1]
        exact = self.small or cancels(x)
        images = max(1, self.memory // (values * (8 if exact else x.element_size())))
        try:
            for part, output in zip(x.split(images), y.split(images), strict=True):
                self._add(part.double() if exact else part, output, drawn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise HalfDoneError("sums of single neurons: fewer of them, probe.neurons, need less") from error

    def _add(self, x: Tensor, y: Tensor, drawn: int) -> None:
        gate = (y[:, self.neurons] > 0).reshape(len(y), len(self.neurons), -1)
        scale = 1.0
        if drawn:
            where = draw_positions(len(x), gate.shape[2], drawn, self.generator).to(x.device)
            scale = gate.shape[2] / drawn
            p, gate = patches_at(x, self.geometry, where), gate.gather(2, where[:, None].expand(-1, gate.shape[1], -1))
        else:
            p = patches(x, self.geometry)
        gate = gate.transpose(0, 1).reshape(len(self.neurons), -1)
        for index, group in enumerate(self.groups):
            fired = p[group][gate[index]]
            sums, total = self.sums[index], scale * fired.sum(0, dtype=torch.float64)
            sums[:-1, :-1].add_(fired.mT @ fired, alpha=scale)
            sums[-1, :-1] += total
            sums[:-1, -1] += total
            sums[-1, -1] += scale * len(fired)

    def state(self) -> dict[str, Tensor]:
        """Return the sums as they are, for :meth:`restore`: going on from them gives the same to the bit."""
        return {"sums": self.sums, "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the :meth:`state` of a collector of the same layer, neurons and settings."""
        if state:
            self.sums = state["sums"].to(self.sums.device, copy=True)
            self.generator.set_state(state["generator"])

    def moments(self) -> FiringMoments:
        """Return the sums over all batches."""
        return FiringMoments(self.sums.clone())


def firing_rho(
    probe: FiringMoments,
    test: FiringMoments,
    weight: Tensor,
    pattern: Pattern,
    regularisation: float,
    memory: int = MEMORY,
) -> tuple[Tensor, float]:
    """Return ρ(S) = 1 - max_v corr(y, vᵀd) over samples with g = 1 (Eq. 1 of Kindermans et al. 2018 where a neuron
    fires).

    Args:
        probe: sums of the split that v is fitted on.
        test: sums of the split that ρ is measured on.
        weight: (K, D), of the neurons that the sums belong to.
        pattern: theirs, (K, D); only a₊ is used.
        regularisation: λ as a multiple of the mean diagonal of each neuron's cov[x | g = 1].
        memory: bytes for temporaries.

    Returns:
        ρ (K,) float64, NaN where a neuron fires less than twice on either split; and the largest regularisation that
        was needed.

    Raises:
        ValueError: where a neuron's covariance cannot be factorised.

    >>> x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    >>> one = torch.cat([x, torch.ones(4, 1).double()], 1)
    >>> sums = FiringMoments((one.T @ one)[None])  # the second value does not depend on the first
    >>> weight, a = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    >>> values, _ = firing_rho(sums, sums, weight, Pattern(a, a, torch.tensor([False])), 1e-6)
    >>> values.tolist()
    [1.0]
    """
    values, largest = [], regularisation
    for index in range(len(weight)):
        fitted_on, measured_on = (sums.moments_of(index, weight[index]) for sums in (probe, test))
        if min(float(fitted_on.n), float(measured_on.n)) < 2:
            values.append(weight.new_full((1,), torch.nan))
            continue
        positive = pattern.positive[index, None]
        own = Pattern(positive, positive, pattern.dead[index, None])
        reader = Probe(fitted_on, regularisation, memory)
        largest = max(largest, reader.regularisation)
        values.append(rho(reader.direction(own), measured_on, own, memory=memory))
    return torch.cat(values), largest
