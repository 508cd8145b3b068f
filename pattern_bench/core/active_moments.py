"""ρ(S) where a neuron fires (the criterion ``positive``), in closed form.

Only samples with g = 1 count, so every neuron has second moments of its own: Σ g x xᵀ, which is a Gram matrix for each.
That is too much for all neurons of a wide layer and little for some, from which the layer's mean is known well enough.
Given them, a neuron is a layer of its own that always fires, and ``core.quality`` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pattern_bench.core.cancellation import cancels
from pattern_bench.core.collector import sampled_positions
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.gram import is_small
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layers import Layer, draw_positions, geometry_of, patch_size, patches, patches_at
from pattern_bench.core.memory import SpentError, is_out_of_memory
from pattern_bench.core.moments import MEMORY, Moments
from pattern_bench.core.probe_closed_form import Probe, rho


def draw_neurons(there: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``there`` neurons, all of them where there are no more, in order: (K,) int64."""
    return torch.randperm(there, generator=generator)[:count].sort().values


@dataclass
class FiringMoments:
    """Sums over the patches of one layer where each of K neurons fires.

    ``sums`` (K, D + 1, D + 1), float64: of (x, 1)(x, 1)ᵀ, so the corner counts them.
    """

    sums: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for files and reductions."""
        return {"sums": self.sums}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FiringMoments:
        """The inverse of :meth:`tensors`, for files.

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
        return FiringMoments(self.sums.to(device))

    def times(self, weight: float) -> FiringMoments:
        """The sums as if every patch had been met ``weight`` times."""
        return FiringMoments(weight * self.sums)

    def add_(self, other: FiringMoments) -> FiringMoments:
        """Adds the sums of other patches in place."""
        self.sums.add_(other.sums)
        return self

    def of(self, place: int, weight: Tensor) -> Moments:
        """Moments of a layer that has the ``place``-th of the neurons alone, with ``weight`` (D,), and has seen only
        patches where it fires."""
        sums = self.sums[place]
        n, x, gram = sums[-1, -1], sums[None, -1, :-1], sums[None, :-1, :-1]
        xu = (gram[0] @ weight)[None]
        none, nothing = torch.zeros_like(n)[None], torch.zeros_like(xu)
        return Moments(
            n=n, x=x, g=n[None], ug=x @ weight, un=none, uug=xu @ weight, uun=none, xg=x, xug=xu, xun=nothing, gram=gram
        )


class FiringCollector:
    """Sums of one layer where some of its neurons fire, over a stream of batches.

    Products are taken in the precision of the activations, or in float64 where ``core.collector`` does, and sums in
    float64.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        neurons: (K,), indices.
        memory: bytes that the unfolded patches of a batch may take; its images are taken in parts.
        positions: share of each image's output positions to use, as of ``core.collector``.
        seed: of the positions.
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
        self.small = is_small(size)
        self.finite = torch.ones((), dtype=torch.bool, device=like.device)
        """Whether every input and output was, so far."""

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch: ``x`` the layer's input, ``y`` its output with bias, before any nonlinearity.

        Raises:
            SpentError: where there is no memory for it. It may have been added in part then, so there is no way on.
        """
        x, y = wide(x), wide(y)
        self.finite &= torch.isfinite(x.sum()) & torch.isfinite(y.sum())
        if not self.geometry.kernel:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        there = y[0, 0].numel()
        drawn = sampled_positions(self.positions, there)
        values = (drawn or there) * self.geometry.groups * self.sums.shape[1]
        exact = self.small or cancels(x)
        images = max(1, self.memory // (values * (8 if exact else x.element_size())))
        try:
            for part, output in zip(x.split(images), y.split(images), strict=True):
                self._add(part.double() if exact else part, output, drawn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SpentError("sums of single neurons: fewer of them, probe.neurons, need less") from error

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
        for place, group in enumerate(self.groups):
            fired = p[group][gate[place]]
            sums, total = self.sums[place], scale * fired.sum(0, dtype=torch.float64)
            sums[:-1, :-1].add_(fired.mT @ fired, alpha=scale)
            sums[-1, :-1] += total
            sums[:-1, -1] += total
            sums[-1, -1] += scale * len(fired)

    def state(self) -> dict[str, Tensor]:
        """The sums as they are, for :meth:`restore`: going on from them gives the same to the bit."""
        return {"sums": self.sums, "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the ``state`` of a collector of the same layer, neurons and settings."""
        if state:
            self.sums = state["sums"].to(self.sums.device, copy=True)
            self.generator.set_state(state["generator"])

    def moments(self) -> FiringMoments:
        """The sums so far."""
        return FiringMoments(self.sums.clone())


def firing_rho(
    probe: FiringMoments,
    test: FiringMoments,
    weight: Tensor,
    pattern: Pattern,
    regularisation: float,
    memory: int = MEMORY,
) -> tuple[Tensor, float]:
    """ρ(S) = 1 - max_v corr(y, vᵀd) over samples with g = 1 (Eq. 1 where the neuron fires).

    Args:
        probe: sums of the split that v is fitted on.
        test: sums of the split that ρ is measured on.
        weight: (K, D), of the neurons that the sums belong to.
        pattern: theirs, (K, D); only a₊ matters.
        regularisation: λ as a multiple of the mean diagonal of each neuron's cov[x | g = 1].
        memory: bytes for temporaries.

    Returns:
        (K,), NaN where a neuron fires less than twice on either split; and the largest regularisation that was needed.

    Raises:
        ValueError: where a neuron's covariance cannot be factorised.
    """
    values, largest = [], regularisation
    for place in range(len(weight)):
        fitted_on, measured_on = (sums.of(place, weight[place]) for sums in (probe, test))
        if min(float(fitted_on.n), float(measured_on.n)) < 2:
            values.append(weight.new_full((1,), torch.nan))
            continue
        positive = pattern.positive[place, None]
        own = Pattern(positive, positive, pattern.dead[place, None])
        reader = Probe(fitted_on, regularisation, memory)
        largest = max(largest, reader.regularisation)
        values.append(rho(reader.direction(own), measured_on, own, memory=memory))
    return torch.cat(values), largest
