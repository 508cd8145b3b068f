"""Compute rho(S) = 1 - max_v corr(y, vᵀd) in closed form, for all neurons of a layer from one factorisation.

With z = (u g, u (1-g)), A = (a₊, a₋), P = cov[x, z] and V = cov[z], the residual d = x - A z has
``cov[d] = Σ + U K Uᵀ`` with U = [P A] and K = [[0, -I], [-I, V]]: a change of rank 4 of the Gram Σ that all
neurons share. The maximum is at v = (cov[d] + λI)⁻¹ cov[d, y], through Woodbury's identity (Kindermans et al.
2018, Eq. 1 and Fig. 3; there by gradient descent).

Shapes: N neurons of a layer, n of them at a time, G groups, D values of a patch, R parts of z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.moments import MEMORY, NO_GRAM, Moments

CRITERIA = ("all", "rectified", "positive")
"""Which output the residual is asked about: see :class:`Target`; ``positive`` is y over samples with g = 1."""
CLOSED_FORM = CRITERIA[:2]
"""Criteria whose Σ all neurons share; ``positive`` has another Σ for every neuron (``core/active_moments.py``)."""
LARGEST_REGULARISATION = 1e-2
"""The largest λ that is tried, as a multiple of Σ's mean diagonal."""
MOST_REGULARISATION = 1e4
"""The largest λ that may be asked for, likewise: Σ has no part in v from there on, and with much larger ones v
vanishes in rounding, which makes ρ 1 for every neuron."""
ROUNDING = 1e-10
"""A variance below this share of the mean square is rounding, and counts as zero."""
SMALLEST_RAISED = 1e-8
"""The first λ that is tried where none, or less, does not do, as a multiple of Σ's mean diagonal."""
COPIES = 24
"""Numbers that solving for one neuron takes, as a multiple of D: right-hand sides, solutions, products."""


@dataclass(frozen=True)
class Target:
    """The output t that the residual is asked about.

    Args:
        criterion: ``all``, t = y over all samples, Eq. (1) to the letter; ``rectified``, t = max(y, 0) = u g + b g,
            what the next layer sees.
        bias: the layer's, (N,), or None; it matters to ``rectified``.

    >>> Target().weights(slice(0, 2), torch.ones(2, 1)).tolist()  # y = u g + u (1-g), up to the bias
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """

    criterion: str = "all"
    bias: Tensor | None = None

    def weights(self, part: slice, unit: Tensor) -> Tensor:
        """Return the weights with which t is the sum of u g, u (1-g) and g, up to a constant: (n, 3).

        Args:
            part: the n neurons.
            unit: what u is measured in, (n, 1).
        """
        one, zero = torch.ones_like(unit), torch.zeros_like(unit)
        if self.criterion == "all":
            return torch.cat([one, one, zero], 1)
        bias = zero if self.bias is None else self.bias[part, None].to(unit)
        return torch.cat([one, zero, bias / unit], 1)


@dataclass(frozen=True)
class _Residual:
    """Second moments of z and of the target t for n neurons, in units of each neuron's standard deviation of u.

    In these units A z and every correlation are the same, and the small systems well scaled. z has R = 2 parts, u g and
    u (1-g); or, where a₊ = a₋, the one part u.
    """

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


def _slices(m: Moments, memory: int) -> list[tuple[int, slice]]:
    """Return each group with slices of its neurons that can be solved for within ``memory`` bytes."""
    groups, d = m.x.shape
    per_group = m.g.shape[0] // groups
    step = max(1, memory // (8 * COPIES * d))
    return [
        (group, slice(start, min(start + step, (group + 1) * per_group)))
        for group in range(groups)
        for start in range(group * per_group, (group + 1) * per_group, step)
    ]


class Probe:
    """Fit the best linear reader v of each neuron's residual to one split's moments.

    Args:
        moments: sums of the probe split, with the Gram matrix.
        regularisation: λ as a multiple of Σ's mean diagonal; raised tenfold, up to ``LARGEST_REGULARISATION``,
            where Σ cannot be factorised with less. The attribute of this name is what was used.
        memory: bytes for the neurons that are solved for at a time, besides Σ's factor itself.

    Raises:
        ValueError: where the moments have no Gram matrix or no patch, the regularisation is negative or above
            ``MOST_REGULARISATION``, or no factorisation exists.

    Two values, the second the first plus noise of its own; the pattern leaves that noise, which tells nothing of u:

    >>> from torch import nn
    >>> from pattern_bench.core.collector import Collector
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    >>> x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, -2.0]])
    >>> collector = Collector(layer, gram=True)
    >>> collector.add(x, layer(x))
    >>> moments, a = collector.moments(), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    >>> pattern = Pattern(a, a, torch.tensor([False]))
    >>> v = Probe(moments, 1e-6).direction(pattern)
    >>> rho(v, moments, pattern).tolist()
    [1.0]
    """

    def __init__(self, moments: Moments, regularisation: float, memory: int = MEMORY) -> None:
        if not 0 <= regularisation <= MOST_REGULARISATION:
            raise ValueError(
                f"regularisation={regularisation:g} is not possible: give a number from 0 to {MOST_REGULARISATION:g}"
            )
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
        """Return the Cholesky factor of Σ + λI, (G, D, D), and whether there is none.

        It takes the memory of Σ: at D = 25,088 a copy would be another 5 GB.
        """
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
        """Return v for each neuron, (N, D) float64; NaN where the target does not vary: there is nothing to fit.

        Args:
            pattern: the layer's patterns, (N, D).
            target: the output that v shall read off the residual.
        """
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
    """Return rho(S) of each neuron on a test split: 1 - corr(t, vᵀd) from that split's moments (Kindermans et al. 2018,
    Eq. 1).

    Args:
        direction: v (N, D), from :meth:`Probe.direction` on another split.
        moments: sums of the test split, with the Gram matrix.
        pattern: the layer's patterns, (N, D).
        target: the same as for the direction.
        memory: bytes for the neurons that are evaluated at a time.

    Returns:
        (N,) float64: NaN where the target does not vary on this split or on v's; 1 where vᵀd does not vary; above 1 by
        noise.

    Raises:
        ValueError: where the moments have no Gram matrix.

    A pattern that finds nothing leaves all of u in the residual, and rho is 0:

    >>> from torch import nn
    >>> from pattern_bench.core.collector import Collector
    >>> layer, x = nn.Linear(1, 1), torch.tensor([[1.0], [2.0], [3.0]])
    >>> collector = Collector(layer, gram=True)
    >>> collector.add(x, layer(x))
    >>> moments, nothing = collector.moments(), torch.zeros(1, 1, dtype=torch.float64)
    >>> pattern = Pattern(nothing, nothing, torch.tensor([False]))
    >>> abs(rho(Probe(moments, 1e-6).direction(pattern), moments, pattern).item()) < 1e-6
    True
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
