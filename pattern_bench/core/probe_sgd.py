"""Fit the readers v of ρ(S) as Kindermans et al. 2018 did: by gradient descent on least squares, all neurons at once.

The residual d = x - S(x) is never computed: vᵀd = vᵀx - (vᵀa₊ g + vᵀa₋ (1-g)) u is one more convolution of the layer's
geometry and a scaled u. Unlike the closed form this serves the criterion ``positive``, and needs no Gram matrix.

Shapes: B images, C input channels, G groups, N neurons, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layers import (
    Layer,
    convolved,
    cross_sum,
    draw_positions,
    geometry_of,
    neurons,
    patch_size,
    patch_sum,
    patches_at,
)

POSITIONS = 256
"""Output positions of an image that the coordinates of v are chosen from."""
FLOOR = 1e-3
"""Coordinates are scaled by at most what directions with this share of the mean variance need."""
WIDEST = 2048
"""Inputs with more channels are scaled, not decorrelated: the decomposition would take longer than the descent."""


def readout(layer: Layer, v: Tensor, pattern: Pattern, x: Tensor, u: Tensor, gate: Tensor) -> Tensor:
    """Return vᵀd at every position, (B, N, output spatial...).

    Args:
        layer: its geometry cuts the patches.
        v: (N, D).
        pattern: (N, D), in the activations' precision.
        x: the layer's input, (B, C, spatial...).
        u: its output without bias, (B, N, output spatial...).
        gate: y > 0, bool of u's shape.

    >>> layer, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0]])
    >>> v, a = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    >>> pattern = Pattern(a, a, torch.tensor([False]))
    >>> readout(layer, v, pattern, x, torch.tensor([[1.0]]), torch.tensor([[True]])).tolist()  # d = (1, 2) - (1, 1)
    [[1.0]]
    """
    vx = convolved(x, v.view_as(layer.weight), None, geometry_of(layer))
    along = (1, -1, *[1] * (u.ndim - 2))
    positive = (v * pattern.positive).sum(1).view(along)
    negative = (v * pattern.negative).sum(1).view(along)
    return vx - torch.where(gate, positive, negative) * u


class Reader(nn.Module):
    """Readers v of all neurons of one layer, and the least-squares problem that they solve.

    The objective is E[(t - vᵀd - c)²] + λ|v|², as in the closed form. Natural images make it so ill-conditioned that
    descent in the coordinates of x does not converge: v is kept in coordinates in which x is decorrelated over channels
    and over kernel taps, estimated on the first batch. That changes the path of the descent, not the solution.

    Args:
        layer: of a canonical network.
        pattern: (N, D) or in the weight's shape.
        criterion: ``all``, ``rectified``, or ``positive``: t = y, over samples with g = 1 only.
        regularisation: λ as a multiple of the mean variance of x's entries.

    >>> layer, x = nn.Linear(2, 1).requires_grad_(False), torch.tensor([[1.0, 2.0], [3.0, 1.0], [-2.0, 0.5]])
    >>> nothing = torch.zeros(1, 2)
    >>> reader = Reader(layer, Pattern(nothing, nothing, torch.tensor([True])), "all", 1e-4)
    >>> reader.calibrate(x, layer(x))
    >>> torch.allclose(reader.loss(x, layer(x)), torch.ones(1))  # for v = 0, the target's variance
    True
    """

    positive: Tensor
    negative: Tensor
    across_channels: Tensor
    across_taps: Tensor
    unit: Tensor
    share: Tensor
    mean_d: Tensor
    mean_t: Tensor
    ridge: Tensor

    def __init__(self, layer: Layer, pattern: Pattern, criterion: str, regularisation: float) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, lest its weights become this module's
        self.criterion, self.regularisation = criterion, regularisation
        n, d, groups = neurons(layer), patch_size(layer), geometry_of(layer).groups
        channels = layer.weight.shape[1]
        like = wide(layer.weight.detach())
        self.register_buffer("positive", pattern.positive.reshape(n, d).to(like))
        self.register_buffer("negative", pattern.negative.reshape(n, d).to(like))
        shape = (groups, channels) if channels > WIDEST else (groups, channels, channels)
        self.register_buffer("across_channels", like.new_zeros(shape))
        self.register_buffer("across_taps", like.new_zeros(groups, d // channels, d // channels))
        self.register_buffer("unit", like.new_ones(n))  # the target's deviation
        self.register_buffer("share", like.new_ones(n))  # of samples that count
        self.register_buffer("mean_d", like.new_zeros(n, d))
        self.register_buffer("mean_t", like.new_zeros(n))
        self.register_buffer("ridge", like.new_zeros(n))
        self.coordinates = nn.Parameter(like.new_zeros(n, channels, d // channels))
        self.offset = nn.Parameter(like.new_zeros(n))

    @property
    def layer(self) -> Any:
        """The layer, which is no submodule."""
        return self._layer[0]

    @property
    def pattern(self) -> Pattern:
        """The patterns, (N, D), in the activations' precision."""
        return Pattern(self.positive, self.negative, torch.zeros_like(self.unit, dtype=torch.bool))

    @property
    def v(self) -> Tensor:
        """The readers in the coordinates of x, (N, D)."""
        groups = len(self.across_channels)
        q = self.coordinates.view(groups, -1, *self.coordinates.shape[1:])
        q = q @ self.across_taps[:, None].mT
        if self.across_channels.ndim == 2:
            q = self.across_channels[:, None, :, None] * q
        else:
            q = self.across_channels[:, None] @ q
        return q.flatten(0, 1).flatten(1) * self.unit[:, None]

    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x, u, the gate, the target t, and which samples count (1 or 0), for a layer's input and output.

        Args:
            x: (B, C, spatial...); (..., C) for a Linear layer.
            y: the output with bias, (B, N, output spatial...); (..., N) for a Linear layer.

        Returns:
            x in at least float32; the others in the shape of the output.
        """
        x, y = wide(x), wide(y)
        if isinstance(self.layer, nn.Linear):
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        gate = y > 0
        bias = self.layer.bias
        # A copy in any case: the network may go on to overwrite y in place.
        u = y.clone() if bias is None else y - wide(bias).view(-1, *[1] * (y.ndim - 2))
        target = y.relu() if self.criterion == "rectified" else u
        counts = gate.to(y.dtype) if self.criterion == "positive" else torch.ones_like(y)
        return x, u, gate, target, counts

    @torch.no_grad()
    def calibrate(self, x: Tensor, y: Tensor) -> None:
        """Choose coordinates, units and centre from a batch of the layer's input and output, as of :meth:`samples`."""
        x, u, gate, target, counts = self.samples(x, y)
        geometry, axes = geometry_of(self.layer), [i for i in range(u.ndim) if i != 1]
        every = u[0, 0].numel()
        generator = torch.Generator().manual_seed(0)
        positions = draw_positions(len(x), every, min(POSITIONS, every), generator).to(x.device)
        p = patches_at(x, geometry, positions).double()
        mean = patch_sum(x, geometry) / (u.numel() / u.shape[1])
        q = (p - p.mean(1, keepdim=True)).view(*p.shape[:2], self.layer.weight.shape[1], -1)
        variance = q.square().sum((2, 3)).mean(1) / p.shape[2]
        variance = variance.where(variance > 0, 1.0)
        if self.across_channels.ndim == 2:
            by_channel = q.square().sum(3).mean(1)
            self.across_channels.copy_((by_channel + FLOOR * by_channel.mean(1, keepdim=True)).clamp(1e-30).rsqrt())
        else:
            self.across_channels.copy_(_decorrelating(torch.einsum("gmct,gmdt->gcd", q, q) / q.shape[1]))
        taps = torch.einsum("gmcs,gmct->gst", q, q) / q.shape[1]
        # The channels' matrix holds the scale already: that of the taps is relative.
        self.across_taps.copy_(_decorrelating(taps / (variance * p.shape[2])[:, None, None]))
        self.ridge.copy_((self.regularisation * variance).repeat_interleave(len(self.unit) // len(variance)))

        total = counts.sum(axes).clamp(min=1)
        self.share.copy_(total / (u.numel() / u.shape[1]))
        centre = (counts * target).sum(axes) / total
        square = (counts * (target - centre.view(-1, *[1] * (u.ndim - 2))).square()).sum(axes) / total
        self.mean_t.copy_(centre)
        self.unit.copy_(square.sqrt().where(square > 0, 1.0))
        if self.criterion == "positive":
            mean_x = cross_sum(x, counts, geometry).flatten(1) / total[:, None]
        else:
            mean_x = mean.repeat_interleave(len(self.unit) // len(mean), 0)
        above, below = ((counts * part * u).sum(axes) / total for part in (gate, ~gate))
        self.mean_d.copy_(mean_x - self.positive * above[:, None] - self.negative * below[:, None])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each neuron's objective in units of the target's variance, (N,): 1 for v = 0, least at the best v."""
        x, u, gate, target, counts = self.samples(x, y)
        v = self.v
        # Centred by the first batch's means; the offset learns what they miss.
        centre = self.mean_t - (v * self.mean_d).sum(1) + self.offset * self.unit
        read = readout(self.layer, v, self.pattern, x, u, gate)
        error = target - read - centre.view(-1, *[1] * (u.ndim - 2))
        squared = (counts * error.square()).mean([i for i in range(u.ndim) if i != 1]) / self.share
        return (squared + self.ridge * v.square().sum(1)) / self.unit.square()


def _decorrelating(covariance: Tensor) -> Tensor:
    """Return W (G, k, k) such that WᵀCW is the identity, but for directions with next to no variance."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    mean = values.mean(1, keepdim=True)
    return vectors * (values + FLOOR * mean.where(mean > 0, 1.0)).rsqrt()[:, None, :]


class Correlation:
    """Measure the correlation of t and vᵀd for each neuron of a layer, batch by batch, in float64.

    Args:
        reader: v, patterns and criterion.

    >>> layer, x = nn.Linear(2, 1).requires_grad_(False), torch.tensor([[1.0, 2.0], [3.0, 1.0], [-2.0, 0.5]])
    >>> nothing = torch.zeros(1, 2)
    >>> correlation = Correlation(Reader(layer, Pattern(nothing, nothing, torch.tensor([True])), "all", 1e-4))
    >>> correlation.add(x, layer(x))
    >>> correlation.rho().tolist()  # v = 0 reads nothing
    [1.0]
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.sums = torch.zeros(6, len(reader.unit), dtype=torch.float64, device=reader.unit.device)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of the layer's input and output, as of :meth:`Reader.samples`."""
        r = self.reader
        x, u, gate, target, counts = r.samples(x, y)
        read = readout(r.layer, r.v, r.pattern, x, u, gate).double()
        target, counts = target.double(), counts.double()
        axes = [i for i in range(u.ndim) if i != 1]
        products = (counts, counts * target, counts * read, counts * target.square(), counts * read.square(),
                    counts * target * read)  # fmt: skip
        self.sums += torch.stack([product.sum(axes) for product in products])

    def state(self) -> dict[str, Tensor]:
        """Return the sums, for :meth:`restore`."""
        return {"sums": self.sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the :meth:`state` of another correlation of the same reader."""
        self.sums = state["sums"].to(self.sums.device, copy=True)

    def rho(self) -> Tensor:
        """Return 1 - corr(t, vᵀd), (N,) float64 (Kindermans et al. 2018, Eq. 1).

        NaN where the target does not vary, 1 where vᵀd does not.
        """
        n, t, r, tt, rr, tr = self.sums
        n = n.clamp(min=1)
        tt, rr, tr = tt / n - (t / n).square(), rr / n - (r / n).square(), tr / n - t * r / n.square()
        scale = (tt.clamp(min=0) * rr.clamp(min=0)).sqrt()
        correlation = torch.where(scale > 0, tr / scale.where(scale > 0, 1.0), 0.0)
        return torch.where(tt > 0, 1 - correlation, torch.nan)
