"""Sufficient statistics of a layer: everything that the estimators and rho(S) need of a data split.

All are plain sums in float64, so they add up over batches, processes and interruptions (Eq. 5 to 7
of Kindermans et al. 2018 need the means of x, u, x u and their restrictions to the gate g = 1[y > 0]).

Shapes: N neurons, G groups, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MEMORY = 2**30
"""Bytes that temporaries may take by default."""
NO_PATCHES = "these moments are of no patch, since no image runs the layer"
NO_GRAM = "these moments were collected without the Gram matrix, which rho needs"


@dataclass
class Moments:
    """Sums over all patches x of one layer, float64; u = wᵀx is a response without its bias, y = u + b, g = 1[y > 0].

    >>> from torch import nn
    >>> from pattern_bench.core.collector import Collector
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 2.0)
    >>> collector, x = Collector(layer, gram=True), torch.tensor([[1.0], [3.0], [-1.0]])
    >>> collector.add(x, layer(x))
    >>> moments = collector.moments()  # u = 2, 6, -2
    >>> moments.n.item(), moments.g.item(), moments.mean_u.item(), moments.var_u.item()
    (3.0, 2.0, 2.0, 10.666666666666666)
    >>> moments.xug.item(), moments.gram.item()
    (20.0, 11.0)
    """

    n: Tensor
    """Number of patches, ()."""
    x: Tensor
    """Σ x, (G, D)."""
    g: Tensor
    """Σ g, (N,): how often each neuron fires."""
    ug: Tensor
    """Σ u g, (N,)."""
    un: Tensor
    """Σ u (1-g), (N,)."""
    uug: Tensor
    """Σ u² g, (N,)."""
    uun: Tensor
    """Σ u² (1-g), (N,)."""
    xg: Tensor
    """Σ x g, (N, D)."""
    xug: Tensor
    """Σ x u g, (N, D)."""
    xun: Tensor
    """Σ x u (1-g), (N, D)."""
    gram: Tensor | None = None
    """Σ x xᵀ, (G, D, D); None where it was not collected."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for files and reductions over processes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Return the moments with these sums, the inverse of :meth:`tensors`.

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
        """Return the same sums on another device."""
        return Moments(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def times(self, weight: float) -> Moments:
        """Return the sums as if every patch occurred ``weight`` times."""
        return Moments(**{name: weight * tensor for name, tensor in self.tensors().items()})

    def add_(self, other: Moments) -> Moments:
        """Add the sums of other patches of the same layer, in place.

        Raises:
            ValueError: where one of the two has the Gram matrix and the other does not.
        """
        mine, others = self.tensors(), other.tensors()
        if mine.keys() != others.keys():
            raise ValueError(f"moments with {sorted(mine)} and with {sorted(others)} do not add up")
        for name, tensor in mine.items():
            tensor.add_(others[name])
        return self

    # --- expectations, float64 ---

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
        """E[x²] of each value, (G, D).

        Raises:
            ValueError: where there is no Gram matrix.
        """
        if self.gram is None:
            raise ValueError(NO_GRAM)
        return self.gram.diagonal(dim1=1, dim2=2) / self.n

    @property
    def cov_x(self) -> Tensor:
        """cov[x], (G, D, D).

        Raises:
            ValueError: where there is no Gram matrix, or no patch.
        """
        if self.gram is None:
            raise ValueError(NO_GRAM)
        if not self.n:
            raise ValueError(NO_PATCHES)
        mean = self.mean_x
        # One tensor of this size, not three: at D = 25,088 it has 5 GB.
        return torch.baddbmm(self.gram, mean[:, :, None], mean[:, None, :], beta=1 / float(self.n), alpha=-1)
