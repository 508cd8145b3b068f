"""Signal estimators: from the moments of a layer to a pattern for each of its neurons.

Every estimator is a class with a ``name`` and ``fit``. With ``u = wᵀx`` and the gate ``g``, the signal that it
finds in a patch is ``S(x) = (a₊ g + a₋ (1-g)) u`` (Kindermans et al. 2018, Eq. 3 and 4).

The examples below are the paper's own (section 2): a neuron with the filter (1, -1) answers y, and cancels the
distractor e of x = (y + e, e). The signal lies along (1, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pattern_bench.core.moments import Moments
from pattern_bench.core.registry import classes_by_name

VANISHING = 1e-10
"""A denominator below this share of the product of the norms that it comes from counts as zero."""


@dataclass(frozen=True)
class Pattern:
    """Patterns of one layer's neurons.

    Args:
        positive: a₊, the pattern where a neuron fires, in the weight's shape or (N, D); float64, zero where undefined.
        negative: a₋, likewise where it does not fire.
        dead: (N,), bool, the neurons that lack one of the two.

    >>> Pattern(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([False])).shaped_like(torch.ones(1, 1, 2, 2)).positive
    tensor([[[[1., 1.],
              [1., 1.]]]])
    """

    positive: Tensor
    negative: Tensor
    dead: Tensor

    def shaped_like(self, weight: Tensor) -> Pattern:
        """Return the same in the weight's shape and precision."""
        positive, negative = (part.reshape(weight.shape).to(weight.dtype) for part in (self.positive, self.negative))
        return Pattern(positive, negative, self.dead)


class Estimator:
    """Base of the signal estimators.

    To add one, write a class here or in a new module of ``pattern_bench/core``, with the attributes below and ``fit``,
    and a file ``conf/estimator/NAME.yaml`` that names it. Tables, figures and the Python interface find it by itself.
    ``tests/unit/test_lists.py`` fails until the settings files that list estimators have it too, and says which.

    >>> class Ones(Estimator):
    ...     name = "ones"
    ...     label = "S_1"
    ...     place = 5
    ...
    ...     def fit(self, weight, moments, generator):
    ...         a = torch.ones_like(weight) / weight.sum(1, keepdim=True)
    ...         return Pattern(a, a, torch.zeros(len(a), dtype=torch.bool))
    >>> Ones().fit(torch.tensor([[1.0, 3.0]]), None, None).positive
    tensor([[0.2500, 0.2500]])
    """

    name: ClassVar[str]
    """In settings and in the files of runs."""
    label: ClassVar[str]
    """In tables and legends; the ``name`` unless a class says otherwise."""
    math_label: ClassVar[str]
    """In figures, where ``$S_a$`` is drawn as a formula; the ``label`` unless a class says otherwise."""
    place: ClassVar[int] = 99
    """In tables and legends: lower stands first, equal ones by name."""
    colour: ClassVar[str | None] = None
    """In every figure, a key of ``plotting.styles.COLOURS``; None for one that no other estimator has."""
    baseline: ClassVar[bool] = False
    """Whether its patterns are drawn at random, so that no value of its ρ is better than another."""
    from_data: ClassVar[bool] = False
    """Whether the pattern depends on the data, and not on the weights alone."""
    has_pattern: bool = True
    """False where the signal is no multiple of u, as for S_x."""
    no_pattern_reason: str = ""
    """Why an estimator without a pattern has no ρ."""

    def __init_subclass__(cls, **options: Any) -> None:
        # Labels are not inherited: a class that extends another one is not that one.
        super().__init_subclass__(**options)
        for own, instead in (("label", "name"), ("math_label", "label")):
            if own not in vars(cls) and hasattr(cls, instead):
                setattr(cls, own, getattr(cls, instead))

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        """Return the patterns of a layer's neurons.

        Args:
            weight: (N, D), float64: a row per neuron.
            moments: the layer's sums over the fit split.
            generator: for estimators that draw; seeded by the job's seed and the layer's name, on the CPU.

        Returns:
            Patterns of shape (N, D), float64, with wᵀa = 1 for each neuron that is not dead.
        """
        raise NotImplementedError


class Random(Estimator):
    """A Gaussian direction v, a = v / wᵀv: the baseline of Fig. 3.

    >>> w = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    >>> a = Random().fit(w, None, torch.Generator().manual_seed(0)).positive
    >>> round(float((w * a).sum()), 9)
    1.0
    """

    name = "random"
    place = 0
    colour = "blue"
    baseline = True

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        v = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        return one_regime(*normalised(v, weight))


class Identity(Estimator):
    """S_x: the signal is the input itself. In a whole network: input times gradient (LRP's z-rule).

    >>> Identity.has_pattern
    False
    """

    name = "x"
    label = "S_x"
    math_label = "$S_x$"
    place = 1
    colour = "brown"
    has_pattern = False
    no_pattern_reason = "S_x(x) = x leaves no residual, so rho says nothing about it"


class Filter(Estimator):
    """S_w: a = w / wᵀw. In a whole network: the w²-rule.

    >>> Filter().fit(torch.tensor([[1.0, -1.0]]), None, None).positive
    tensor([[ 0.5000, -0.5000]])
    """

    name = "w"
    label = "S_w"
    math_label = "$S_w$"
    place = 2
    colour = "green"

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        return one_regime(*normalised(weight, weight))


class Linear(Estimator):
    """S_a: a = cov[x, u] / var[u] (Eq. 3).

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> w = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]])).double()
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> Linear().fit(w, pb.collect_moments(model, [images])["0"], None).positive
    tensor([[1., 0.]], dtype=torch.float64)
    """

    name = "a"
    label = "S_a"
    math_label = "$S_a$"
    place = 3
    colour = "vermilion"
    from_data = True

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        return one_regime(*normalised(moments.cov_xu, weight))


class TwoRegimes(Estimator):
    """S_a+- (Eq. 4): a₊ = (E₊[x u] - E₊[x] E[u]) / (wᵀ of the numerator), a₋ likewise (Eq. 7). The bias cancels.

    Where the neuron below does not fire, the signal lies along (0, 1) instead.

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> w = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]])).double()
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [1.0, 2.0], [-1.0, 0.0]])
    >>> pattern = TwoRegimes().fit(w, pb.collect_moments(model, [images])["0"], None)
    >>> pattern.positive.tolist(), pattern.negative.tolist()
    ([[1.0, 0.0]], [[0.0, -1.0]])
    """

    name = "a_plus_minus"
    label = "S_a+-"
    math_label = "$S_{a+-}$"
    place = 4
    colour = "purple"
    from_data = True

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        m = moments
        mean_u = m.mean_u[:, None]
        fires, rests = m.g, m.n - m.g
        x_positive = m.xg
        x_negative = m.x.repeat_interleave(len(m.g) // len(m.x), 0) - m.xg

        def regime(xu: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
            numerator = (xu - x * mean_u) / count.clamp(min=1)[:, None]
            pattern, defined = normalised(numerator, weight)
            defined &= count > 0
            return pattern * defined[:, None], defined

        positive, has_positive = regime(m.xug, x_positive, fires)
        negative, has_negative = regime(m.xun, x_negative, rests)
        return Pattern(positive, negative, ~(has_positive & has_negative))


def by_name() -> dict[str, type[Estimator]]:
    """Return every estimator of the suite by its name, in the order of tables and legends.

    >>> [kind.label for kind in by_name().values()]
    ['random', 'S_x', 'S_w', 'S_a', 'S_a+-']
    """
    return classes_by_name(Estimator, "pattern_bench.core")


def normalised(direction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``direction / wᵀdirection`` (N, D), and where that is defined (N,) bool; zero elsewhere.

    Args:
        direction: (N, D), float64, of any length.
        weight: (N, D).

    >>> normalised(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]]))
    (tensor([[0.2500, 0.2500]]), tensor([True]))
    """
    denominator = (weight * direction).sum(1)
    defined = denominator.abs() > VANISHING * weight.norm(dim=1) * direction.norm(dim=1)
    safe = torch.where(defined, denominator, 1.0)
    return torch.where(defined[:, None], direction / safe[:, None], 0.0), defined


def one_regime(pattern: Tensor, defined: Tensor) -> Pattern:
    """Return (N, D) as the patterns of neurons that fire and that do not; those not ``defined`` (N,) are dead.

    >>> one_regime(torch.ones(1, 2), torch.tensor([True])).dead
    tensor([False])
    """
    return Pattern(pattern, pattern, ~defined)
