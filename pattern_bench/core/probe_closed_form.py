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
from pattern_bench.core.moments import MEMORY, NO_GRAM, Moments

CRITERIA = ("all", "rectified", "positive")
CLOSED_FORM = CRITERIA[:2]
"""From moments that all neurons share; ``positive`` has another Σ for every neuron (``core/firing.py``)."""
LARGEST_REGULARISATION = 1e-2
ROUNDING = 1e-10
"""Inputs that vary by less than this share of their mean square do not vary."""


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
    (A z and every correlation stay as they are; the small systems become well scaled). z has R = 2 parts, u g and
    u (1-g); or, where a₊ = a₋, the one part u."""

    a: Tensor  # (n, D, R)
    p: Tensor  # (n, D, R) = cov[x, z]
    v: Tensor  # (n, R, R) = cov[z]
    xt: Tensor  # (n, D) = cov[x, t]
    zt: Tensor  # (n, R) = cov[z, t]
    tt: Tensor  # (n,) = var[t]
    linear: bool  # whether t is the sum of z's parts, up to a constant

    @property
    def dt(self) -> Tensor:
        """cov[d, t], (n, D)."""
        return self.xt - (self.a @ self.zt[:, :, None]).squeeze(2)


def _residual(m: Moments, pattern: Pattern, part: slice, target: Target) -> _Residual:
    deviation = m.var_u[part].clamp(min=0).sqrt()
    unit = torch.where(deviation > 0, deviation, 1.0)[:, None]
    mean_x = m.mean_x_per_neuron[part]
    # u g, u (1-g) and the gate g, in a row.
    mean = torch.stack([m.ug[part] / unit[:, 0], m.un[part] / unit[:, 0], m.g[part]], 1) / m.n
    crossed = torch.stack([m.xug[part] / unit, m.xun[part] / unit, m.xg[part]], 2) / m.n
    second = torch.diag_embed(torch.stack([m.uug[part], m.uun[part]], 1) / m.n / unit.square())
    second = torch.nn.functional.pad(second, (0, 1, 0, 1))
    second[:, 2, 2] = mean[:, 2]
    second[:, 0, 2] = second[:, 2, 0] = mean[:, 0]
    p = crossed - mean_x[:, :, None] * mean[:, None, :]
    v = second - mean[:, :, None] * mean[:, None, :]
    positive, negative = pattern.positive[part], pattern.negative[part]
    parts = [[1, 0, 0], [0, 1, 0]]
    if torch.equal(positive, negative):
        parts = [[1, 1, 0]]
    z = torch.tensor(parts, dtype=p.dtype, device=p.device).T
    a = torch.stack([positive, negative][: len(parts)], 2) * unit[:, :, None]
    t = target.weights(part, unit)
    vt = v @ t[:, :, None]
    return _Residual(
        a=a,
        p=p @ z,
        v=z.T @ v @ z,
        xt=(p @ t[:, :, None]).squeeze(2),
        zt=(z.T @ vt).squeeze(2),
        tt=(vt.squeeze(2) * t).sum(1).clamp(min=0),
        linear=target.criterion == "all",
    )


SMALLEST_RAISED = 1e-8
"""The first λ that is tried where none, or less, does not do, as a multiple of Σ's mean diagonal."""
COPIES = 24
"""How many times the patches' size D a neuron takes while it is solved for: right-hand sides, solutions, products."""


def _slices(m: Moments, memory: int) -> list[tuple[int, slice]]:
    """Neurons group by group, in parts that stay within ``memory`` bytes."""
    groups, d = m.x.shape
    per_group = m.g.shape[0] // groups
    step = max(1, memory // (8 * COPIES * d))
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
        memory: bytes for the neurons that are solved for at a time, besides Σ's factor itself.

    Raises:
        ValueError: where no factorisation exists.
    """

    def __init__(self, moments: Moments, regularisation: float, memory: int = MEMORY) -> None:
        self.moments, self.memory = moments, memory
        self.regularisation = regularisation
        self.factor, failed = self._factorise()
        # Rounding of float32 products can leave Σ short of positive definite by more than a small λ.
        while failed and self.regularisation < LARGEST_REGULARISATION:
            self.regularisation = max(10 * self.regularisation, SMALLEST_RAISED)
            self.factor, failed = self._factorise()
        if failed:
            raise ValueError(
                f"cov[x] is not positive definite, even with a ridge of {self.regularisation:g} times its mean "
                "diagonal: are there NaN or infinite activations?"
            )

    def _factorise(self) -> tuple[Tensor, bool]:
        """Σ + λI's factor, (G, D, D), in the memory of Σ: at D = 25,088 a copy would be another 5 GB."""
        covariance, square = self.moments.cov_x, self.moments.square_x
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1, keepdim=True)
        # Below the rounding of the sums that it comes from, a variance is none.
        scale = scale.maximum(ROUNDING * square.mean(1, keepdim=True))
        # An all-zero Σ (every input dead) leaves nothing to read; any positive λ then gives v = 0.
        diagonal += self.regularisation * torch.where(scale > 0, scale, 1.0)
        info = torch.empty(len(covariance), dtype=torch.int32, device=covariance.device)
        # LAPACK counts in columns: the transpose, which is the same matrix, is factorised without a copy.
        factor = covariance.mT
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        return factor, bool(info.any())

    def direction(self, pattern: Pattern, target: Target = Target()) -> Tensor:
        """v for each neuron, (N, D); NaN where the target does not vary, so that there is nothing to fit."""
        parts = [
            self._solve(group, _residual(self.moments, pattern, part, target))
            for group, part in _slices(self.moments, self.memory)
        ]
        return torch.cat(parts)

    def _solve(self, group: int, r: _Residual) -> Tensor:
        n, d, parts = r.p.shape
        u = torch.cat([r.p, r.a], 2)  # (n, D, 2R)
        # Where t is the sum of z's parts, cov[d, t] is a combination of the columns of U, and so is its solution.
        rhs = u if r.linear else torch.cat([u, r.dt[:, :, None]], 2)
        solved = torch.cholesky_solve(rhs.permute(1, 0, 2).reshape(d, -1), self.factor[group])
        solved = solved.reshape(d, n, -1).permute(1, 0, 2)
        iu = solved[:, :, : 2 * parts]
        ir = iu @ torch.cat([torch.ones_like(r.zt), -r.zt], 1)[:, :, None] if r.linear else solved[:, :, 2 * parts :]
        eye = torch.eye(parts, dtype=u.dtype, device=u.device).expand(n, parts, parts)
        inverse_k = torch.cat([torch.cat([-r.v, -eye], 2), torch.cat([-eye, torch.zeros_like(eye)], 2)], 1)
        small = torch.linalg.solve(inverse_k + u.mT @ iu, u.mT @ ir)
        return torch.where(r.tt[:, None] > 0, (ir - iu @ small).squeeze(2), torch.nan)


def rho(
    direction: Tensor, moments: Moments, pattern: Pattern, target: Target = Target(), memory: int = MEMORY
) -> Tensor:
    """rho(S) of each neuron on a test split: 1 - corr(t, vᵀd) from that split's moments.

    Args:
        direction: v (N, D), from :meth:`Probe.direction` on another split.
        moments: sums of the test split, with the Gram matrix.
        pattern: the layer's patterns, (N, D).
        target: the same as for the direction.
        memory: bytes for the neurons that are evaluated at a time.

    Returns:
        (N,), NaN where the target does not vary on this split or on v's; 1 where v reads nothing; above 1 by
        noise.
    """
    if moments.gram is None:
        raise ValueError(NO_GRAM)
    values = []
    for group, part in _slices(moments, memory):
        r, v = _residual(moments, pattern, part, target), direction[part]
        vp = torch.einsum("nd,ndk->nk", v, r.p)
        va = torch.einsum("nd,ndk->nk", v, r.a)
        read = ((v @ moments.gram[group]) * v).sum(1) / moments.n - (v @ moments.mean_x[group]).square()
        variance = read - 2 * (vp * va).sum(1) + torch.einsum("nk,nkl,nl->n", va, r.v, va)
        covariance = (v * r.dt).sum(1)
        scale = (variance.clamp(min=0) * r.tt.clamp(min=0)).sqrt()
        correlation = torch.where(scale > 0, covariance / scale.where(scale > 0, 1.0), 0.0)
        defined = (r.tt > 0) & v.isfinite().all(1)
        values.append(torch.where(defined, 1 - correlation, torch.nan))
    return torch.cat(values)
