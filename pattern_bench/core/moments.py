"""Sufficient statistics of a layer: everything that the estimators and rho(S) need of a data split.

All are plain sums in float64, so they add up over batches, processes and interruptions (Eq. 5 to 7
of Kindermans et al. 2018 need the means of x, u, x u and their restrictions to the gate g = 1[y > 0]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MEMORY = 2**30
"""Bytes that temporaries may take, unless told otherwise."""
NO_GRAM = "these moments were collected without the Gram matrix, which rho needs"


@dataclass
class Moments:
    """Sums over all patches of one layer. ``u = wᵀx`` without the bias, ``y = u + b``, ``g = 1[y > 0]``.

    ``n`` () counts patches; ``x`` (G, D) sums patches; ``g``, ``ug``, ``un``, ``uug``, ``uun`` (N,) sum the gate,
    u g, u (1-g), u² g and u² (1-g); ``xg``, ``xug``, ``xun`` (N, D) sum the same times the patch; ``gram``
    (G, D, D) sums the products x xᵀ, or is None where nobody asked for it. All float64.
    """

    n: Tensor
    x: Tensor
    g: Tensor
    ug: Tensor
    un: Tensor
    uug: Tensor
    uun: Tensor
    xg: Tensor
    xug: Tensor
    xun: Tensor
    gram: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for files and reductions."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """The inverse of :meth:`tensors`, for files.

        Raises:
            ValueError: where a sum is missing, unknown, of another type or of a shape that does not fit the others;
                where ``n`` or ``g`` cannot be counts.
        """
        known = {f.name for f in fields(cls)}
        if odd := sorted(known - {"gram"} - tensors.keys() | tensors.keys() - known):
            raise ValueError(f"moments lack, or should not have, {', '.join(odd)}")
        if odd := sorted(name for name, tensor in tensors.items() if tensor.dtype != torch.float64):
            raise ValueError(f"moments must be float64, and {', '.join(odd)} are not")
        x, xg = tensors["x"], tensors["xg"]
        if x.ndim != 2 or xg.ndim != 2 or 0 in x.shape or xg.shape[0] % x.shape[0]:
            raise ValueError(f"moments of {tuple(xg.shape)} neurons and inputs in {tuple(x.shape)} groups and inputs")
        (groups, size), neurons = x.shape, xg.shape[0]
        shapes = {"n": (), "x": (groups, size), "gram": (groups, size, size)}
        shapes |= dict.fromkeys(("g", "ug", "un", "uug", "uun"), (neurons,))
        shapes |= dict.fromkeys(("xg", "xug", "xun"), (neurons, size))
        if odd := sorted(name for name, tensor in tensors.items() if tensor.shape != shapes[name]):
            raise ValueError(f"moments do not fit together: {', '.join(f'{n} {tuple(tensors[n].shape)}' for n in odd)}")
        n, g = tensors["n"], tensors["g"]
        if not (n.isfinite() and bool(((g >= 0) & (g <= n)).all())):
            raise ValueError(f"moments of {float(n):g} patches cannot have neurons that fire for {g.tolist()[:4]}…")
        return cls(**tensors)

    def to(self, device: torch.device | str) -> Moments:
        return Moments(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def times(self, weight: float) -> Moments:
        """The sums as if every patch had been met ``weight`` times."""
        return Moments(**{name: weight * tensor for name, tensor in self.tensors().items()})

    def add_(self, other: Moments) -> Moments:
        """Adds the sums of other patches in place."""
        mine, others = self.tensors(), other.tensors()
        if mine.keys() != others.keys():
            raise ValueError(f"moments with {sorted(mine)} and with {sorted(others)} do not add up")
        for name, tensor in mine.items():
            tensor.add_(others[name])
        return self

    # Expectations, float64.

    @property
    def mean_x(self) -> Tensor:
        """E[x], (G, D)."""
        return self.x / self.n

    @property
    def mean_x_per_neuron(self) -> Tensor:
        """E[x] of the group that each neuron belongs to, (N, D)."""
        return self.mean_x.repeat_interleave(self.g.shape[0] // self.x.shape[0], 0)

    @property
    def mean_u(self) -> Tensor:
        """E[u], (N,)."""
        return (self.ug + self.un) / self.n

    @property
    def var_u(self) -> Tensor:
        """var[u], (N,)."""
        return (self.uug + self.uun) / self.n - self.mean_u.square()

    @property
    def cov_xu(self) -> Tensor:
        """cov[x, u], (N, D)."""
        return (self.xug + self.xun) / self.n - self.mean_u[:, None] * self.mean_x_per_neuron

    @property
    def square_x(self) -> Tensor:
        """E[x²] of each value, (G, D)."""
        if self.gram is None:
            raise ValueError(NO_GRAM)
        return self.gram.diagonal(dim1=1, dim2=2) / self.n

    @property
    def cov_x(self) -> Tensor:
        """cov[x], (G, D, D)."""
        if self.gram is None:
            raise ValueError(NO_GRAM)
        mean = self.mean_x
        # One tensor of this size, not three: at D = 25,088 it has 5 GB.
        return torch.baddbmm(self.gram, mean[:, :, None], mean[:, None, :], beta=1 / float(self.n), alpha=-1)
