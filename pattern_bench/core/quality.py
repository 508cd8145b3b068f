"""rho(S) = 1 - max_v corr(y, vᵀd) in closed form, for all neurons of a layer from one factorisation.

With z = (u g, u (1-g)), A = (a₊, a₋), P = cov[x, z] and V = cov[z], the residual d = x - A z has
``cov[d] = Σ + U K Uᵀ`` with U = [P A] and K = [[0, -I], [-I, V]]: a change of rank 4 of the Gram Σ that all
neurons share. The maximum is at v = (cov[d] + λI)⁻¹ cov[d, y], through Woodbury's identity (Kindermans et al.
2018, Eq. 1 and Fig. 3; there by gradient descent).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.moments import Moments

CRITERIA = ("all", "rectified")
RHS_BYTES = 512 * 2**20
LARGEST_REGULARISATION = 1e-2


@dataclass(frozen=True)
class Target:
    """Which output the residual is asked about.

    ``all``: t = y over all samples, Eq. (1) to the letter. ``rectified``: t = max(y, 0) = u g + b g, what the next
    layer sees. ``bias`` (N,) is the layer's, None for none.
    """

    criterion: str = "all"
    bias: Tensor | None = None

    def weights(self, part: slice, unit: Tensor) -> Tensor:
        """t as a sum of u g, u (1-g) (both in ``unit``, (n, 1)) and g, up to a constant: (n, 3)."""
        one, zero = torch.ones_like(unit), torch.zeros_like(unit)
        if self.criterion == "all":
            return torch.cat([one, one, zero], 1)
        bias = zero if self.bias is None else self.bias[part, None].to(unit)
        return torch.cat([one, zero, bias / unit], 1)


@dataclass(frozen=True)
class _Residual:
    """Second moments of z and of the target t for a slice of n neurons, in units of each neuron's deviation of u
    (A z and every correlation stay as they are; the 4 × 4 systems become well scaled)."""

    a: Tensor  # (n, D, 2)
    p: Tensor  # (n, D, 2) = cov[x, z]
    v: Tensor  # (n, 2, 2) = cov[z]
    xt: Tensor  # (n, D) = cov[x, t]
    zt: Tensor  # (n, 2) = cov[z, t]
    tt: Tensor  # (n,) = var[t]

    @property
    def dt(self) -> Tensor:
        """cov[d, t], (n, D)."""
        return self.xt - (self.a @ self.zt[:, :, None]).squeeze(2)


def _residual(m: Moments, pattern: Pattern, part: slice, target: Target) -> _Residual:
    deviation = m.var_u[part].clamp(min=0).sqrt()
    unit = torch.where(deviation > 0, deviation, 1.0)[:, None]
    mean_x = m.mean_x_per_neuron[part]
    # z and the gate g, in a row: u g, u (1-g), g.
    mean = torch.stack([m.ug[part] / unit[:, 0], m.un[part] / unit[:, 0], m.g[part]], 1) / m.n
    crossed = torch.stack([m.xug[part] / unit, m.xun[part] / unit, m.xg[part]], 2) / m.n
    second = torch.diag_embed(torch.stack([m.uug[part], m.uun[part]], 1) / m.n / unit.square())
    second = torch.nn.functional.pad(second, (0, 1, 0, 1))
    second[:, 2, 2] = mean[:, 2]
    second[:, 0, 2] = second[:, 2, 0] = mean[:, 0]
    p = crossed - mean_x[:, :, None] * mean[:, None, :]
    v = second - mean[:, :, None] * mean[:, None, :]
    a = torch.stack([pattern.positive[part], pattern.negative[part]], 2) * unit[:, :, None]
    t = target.weights(part, unit)
    zt = (v @ t[:, :, None]).squeeze(2)
    return _Residual(
        a, p[:, :, :2], v[:, :2, :2], (p @ t[:, :, None]).squeeze(2), zt[:, :2], (zt * t).sum(1).clamp(min=0)
    )


def _slices(m: Moments) -> list[tuple[int, slice]]:
    """Neurons group by group, in parts whose right-hand sides stay within ``RHS_BYTES``."""
    groups, d = m.x.shape
    per_group = m.g.shape[0] // groups
    step = max(1, RHS_BYTES // (8 * 8 * d))
    return [
        (group, slice(start, min(start + step, (group + 1) * per_group)))
        for group in range(groups)
        for start in range(group * per_group, (group + 1) * per_group, step)
    ]


class Probe:
    """The best linear reader of a residual, fitted on one split's moments.

    Args:
        moments: sums of the probe split, with the Gram matrix.
        regularisation: λ as a multiple of Σ's mean diagonal; raised tenfold, up to ``LARGEST_REGULARISATION``,
            where Σ cannot be factorised with less. The attribute of this name holds what was used.

    Raises:
        ValueError: where no factorisation exists.
    """

    def __init__(self, moments: Moments, regularisation: float) -> None:
        self.moments = moments
        covariance = moments.cov_x
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1)
        # An all-zero Σ (every input dead) leaves nothing to read; any positive λ then gives v = 0.
        scale = torch.where(scale > 0, scale, 1.0)
        self.regularisation = regularisation
        self.factor, failed = self._factorise(covariance, scale)
        # Rounding of float32 products can leave Σ short of positive definite by more than a small λ.
        while failed and self.regularisation < LARGEST_REGULARISATION:
            self.regularisation *= 10
            self.factor, failed = self._factorise(covariance, scale)
        if failed:
            raise ValueError(
                f"cov[x] is not positive definite, even with a ridge of {self.regularisation:g} times its mean "
                "diagonal: are there NaN or infinite activations?"
            )

    def _factorise(self, covariance: Tensor, scale: Tensor) -> tuple[Tensor, bool]:
        ridge = (self.regularisation * scale)[:, None].expand(-1, covariance.shape[1])
        factor, info = torch.linalg.cholesky_ex(covariance + torch.diag_embed(ridge))
        return factor, bool(info.any())

    def direction(self, pattern: Pattern, target: Target = Target()) -> Tensor:
        """v for each neuron, (N, D); NaN where the target does not vary, so that there is nothing to fit."""
        parts = [
            self._solve(group, _residual(self.moments, pattern, part, target)) for group, part in _slices(self.moments)
        ]
        return torch.cat(parts)

    def _solve(self, group: int, r: _Residual) -> Tensor:
        n, d, _ = r.p.shape
        u = torch.cat([r.p, r.a], 2)  # (n, D, 4)
        rhs = torch.cat([u, r.dt[:, :, None]], 2)
        solved = torch.cholesky_solve(rhs.permute(1, 0, 2).reshape(d, -1), self.factor[group])
        solved = solved.reshape(d, n, 5).permute(1, 0, 2)
        iu, ir = solved[:, :, :4], solved[:, :, 4:]
        eye, zero = torch.eye(2, dtype=u.dtype, device=u.device).expand(n, 2, 2), u.new_zeros(n, 2, 2)
        inverse_k = torch.cat([torch.cat([-r.v, -eye], 2), torch.cat([-eye, zero], 2)], 1)
        small = torch.linalg.solve(inverse_k + u.mT @ iu, u.mT @ ir)
        return torch.where(r.tt[:, None] > 0, (ir - iu @ small).squeeze(2), torch.nan)


def rho(direction: Tensor, moments: Moments, pattern: Pattern, target: Target = Target()) -> Tensor:
    """rho(S) of each neuron on a test split: 1 - corr(t, vᵀd) from that split's moments.

    Args:
        direction: v (N, D), from :meth:`Probe.direction` on another split.
        moments: sums of the test split, with the Gram matrix.
        pattern: the layer's patterns, (N, D).
        target: the same as for the direction.

    Returns:
        (N,), NaN where the target does not vary on this split or on v's; 1 where v reads nothing; above 1 by
        noise.
    """
    sigma = moments.cov_x
    values = []
    for group, part in _slices(moments):
        r, v = _residual(moments, pattern, part, target), direction[part]
        vp = torch.einsum("nd,ndk->nk", v, r.p)
        va = torch.einsum("nd,ndk->nk", v, r.a)
        variance = ((v @ sigma[group]) * v).sum(1) - 2 * (vp * va).sum(1) + torch.einsum("nk,nkl,nl->n", va, r.v, va)
        covariance = (v * r.dt).sum(1)
        scale = (variance.clamp(min=0) * r.tt.clamp(min=0)).sqrt()
        correlation = torch.where(scale > 0, covariance / scale.where(scale > 0, 1.0), 0.0)
        defined = (r.tt > 0) & v.isfinite().all(1)
        values.append(torch.where(defined, 1 - correlation, torch.nan))
    return torch.cat(values)
