"""The example of section 2 of Kindermans et al. 2018, x = a_s y + a_d ε: its one neuron, exact and fitted.

``data.toy`` draws it: y is uniform in [-1, 1], so var[y] = 1/3; ε has unit variance; a_s = (1, 0); and
a_d = √2 (cos φ, sin φ). Everything here is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pattern_bench as pb
from pattern_bench.api import LayerMoments, Moments
from pattern_bench.data.toy import Toy
from pattern_bench.models.small import LinearModel

LAYER = "linear"
SIGNAL = torch.tensor([1.0, 0.0], dtype=torch.float64)
_ALL = {"name": "toy", "fit": 1.0, "probe": 1.0, "validation": 1.0, "limit": None, "batch_size": 1, "workers": 0}


@dataclass(frozen=True)
class Neuron:
    """y = wᵀx + b as a network of the suite, and the moments that its patterns are fitted from."""

    network: nn.Module
    moments: LayerMoments

    @property
    def w(self) -> Tensor:
        """(2,)."""
        weight: Any = self.network.get_submodule(LAYER).weight
        return weight.detach()[0]

    @property
    def a(self) -> Tensor:
        """S_a's pattern, (2,)."""
        return pb.fit_patterns(self.network, self.moments, "a")[LAYER].positive[0]


def distractor(phi: float) -> Tensor:
    """a_d (2,) for an angle in degrees."""
    radians = math.radians(phi)
    return math.sqrt(2) * torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)


def drawn(samples: int, phi: float, seed: int) -> tuple[Tensor, Tensor]:
    """x (samples, 2) and y (samples,)."""
    pool: Any = Toy(samples=samples, angle=phi, data_seed=seed, strict=True, **_ALL).pools()[0]
    return pool.images.double(), torch.tensor(pool.labels, dtype=torch.float64)


def exact(phi: float) -> Neuron:
    """The neuron of infinitely many samples: w = Σ⁻¹ cov[x, y] = (1, -1/tan φ), and the moments in closed form."""
    a_d = distractor(phi)
    covariance = SIGNAL.outer(SIGNAL) / 3 + a_d.outer(a_d)
    w = torch.linalg.solve(covariance, SIGNAL / 3)
    xu = (covariance @ w)[None]
    half = torch.full((1,), 0.5, dtype=torch.float64)
    moments = Moments(
        # -x is as likely as x, so both regimes have half of E[x u] and of E[u²]; and E[y g] = 1/4.
        n=torch.ones((), dtype=torch.float64), x=torch.zeros(1, 2, dtype=torch.float64), g=half,
        ug=half / 2, un=-half / 2, uug=(w * xu).sum(1) / 2, uun=(w * xu).sum(1) / 2,
        xg=SIGNAL[None] / 4, xug=xu / 2, xun=xu / 2, gram=covariance[None],
    )  # fmt: skip
    return Neuron(_network(w, 0.0), LayerMoments({LAYER: moments}, SIGNAL[None]))


def fitted(samples: int, phi: float, seed: int) -> Neuron:
    """The neuron that least squares finds on drawn samples, and the moments of these samples."""
    x, y = drawn(samples, phi, seed)
    coefficients = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y[:, None]).solution[:, 0]
    network = _network(coefficients[:2], float(coefficients[2]))
    return Neuron(network, pb.collect_moments(network, [x]))


def _network(w: Tensor, bias: float) -> nn.Module:
    source = LinearModel(name="linear", weights=None, training=None, classifier=False)
    network = source.module(SIGNAL, None).double().eval().requires_grad_(False)
    layer: Any = network.get_submodule(LAYER)
    layer.weight.copy_(w[None])
    layer.bias.fill_(bias)
    return network
