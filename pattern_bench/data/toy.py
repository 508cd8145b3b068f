"""The linear example of section 2 of Kindermans et al. 2018: x = a_s y + a_d ε, where the signal is known."""

from __future__ import annotations

import math
from typing import Any

import torch

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.data.base import DRAWN, Pool, Source, TensorPool


class Toy(Source):
    """Two-dimensional samples; the target is y.

    y is uniform in [-1, 1], ε Gaussian with unit variance, a_s = (1, 0) and a_d = √2 (cos φ, sin φ), so that the
    paper's (1, 1) is φ = 45°. A linear model that recovers y has w = (1, -1/tan φ): it turns with the distractor,
    the signal does not.

    Args:
        samples: number of samples.
        angle: φ in degrees, not a multiple of 180.
        data_seed: seed of the draws.
    """

    regression = True

    def __init__(self, *, samples: int, angle: float, data_seed: int, **common: Any) -> None:
        super().__init__(**common)
        check_arguments(DRAWN, samples=samples, angle=angle, data_seed=data_seed)
        self.samples, self.angle, self.data_seed = samples, angle, data_seed
        self.signal = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def pools(self) -> tuple[Pool, Pool | None]:
        generator = torch.Generator().manual_seed(self.data_seed)
        y = torch.rand(self.samples, generator=generator) * 2 - 1
        noise = torch.randn(self.samples, generator=generator)
        phi = math.radians(self.angle)
        distractor = math.sqrt(2) * torch.tensor([math.cos(phi), math.sin(phi)])
        x = y[:, None] * torch.tensor([1.0, 0.0]) + noise[:, None] * distractor
        return TensorPool(x, y, None), None
