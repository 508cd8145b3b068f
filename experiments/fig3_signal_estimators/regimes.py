"""Another reading of Eq. (7), to see what S_a+- leaves where a neuron fires."""

from __future__ import annotations

import torch
from torch import Tensor

from pattern_bench.api import Estimator, Moments, Pattern


class OwnMeans(Estimator):
    """a₊ = cov[x, u | g = 1] / var[u | g = 1], a₋ likewise: each regime about its own means, where Eq. (7) takes E[u]
    over both. Within each regime its residual is uncorrelated with u, by construction."""

    name = "own_means"

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        m = moments
        x_all = m.mean_x_per_neuron * m.n
        fires = (m.g, m.xg, m.ug, m.xug)
        rests = (m.n - m.g, x_all - m.xg, m.un, m.xun)
        patterns, defined = [], torch.ones_like(m.g, dtype=torch.bool)
        for count, x, u, xu in (fires, rests):
            count = count.clamp(min=1)
            covariance = xu / count[:, None] - x * (u / count.square())[:, None]
            variance = (weight * covariance).sum(1)
            fine = variance > 1e-10 * weight.norm(dim=1) * covariance.norm(dim=1)
            patterns.append(torch.where(fine[:, None], covariance / variance.where(fine, 1.0)[:, None], 0.0))
            defined &= fine
        return Pattern(patterns[0], patterns[1], ~defined)
