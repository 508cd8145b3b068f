"""Signal estimators: from the moments of a layer to a pattern for each of its neurons.

Every estimator is a class with a ``name`` and ``fit``. With ``u = wᵀx`` and the gate ``g``, the signal that it
finds in a patch is ``S(x) = (a₊ g + a₋ (1-g)) u`` (Kindermans et al. 2018, Eq. 3 and 4).
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
    """Patterns of one layer's neurons: ``positive`` a₊ and ``negative`` a₋ in the weight's shape, float64, zero
    where undefined; ``dead`` (N,) tells which neurons lack one of the two."""

    positive: Tensor
    negative: Tensor
    dead: Tensor

    def shaped_like(self, weight: Tensor) -> Pattern:
        """The same in the weight's shape and precision."""
        positive, negative = (part.reshape(weight.shape).to(weight.dtype) for part in (self.positive, self.negative))
        return Pattern(positive, negative, self.dead)


class Estimator:
    """Base of the signal estimators.

    ``has_pattern`` is False for the identity S_x, whose signal is not a multiple of u; such an estimator says in
    ``no_pattern_reason`` why it has no rho.
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
    from_data: ClassVar[bool] = False
    """Whether the pattern depends on the data, and not on the weights alone."""
    has_pattern: bool = True
    no_pattern_reason: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        # Labels are not inherited: a class that extends another one is not that one.
        super().__init_subclass__(**options)
        for own, instead in (("label", "name"), ("math_label", "label")):
            if own not in vars(cls) and hasattr(cls, instead):
                setattr(cls, own, getattr(cls, instead))

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        """Patterns of a layer.

        Args:
            weight: (N, D), float64.
            moments: the layer's sums over the fit split.
            generator: for estimators that draw; seeded by the job's seed and the layer's name, on the CPU.

        Returns:
            Patterns of shape (N, D).
        """
        raise NotImplementedError


class Random(Estimator):
    """A Gaussian direction v, a = v / wᵀv: the baseline of Fig. 3."""

    name = "random"
    place = 0
    colour = "blue"

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        v = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        return _one_regime(*_normalised(v, weight))


class Identity(Estimator):
    """S_x: the signal is the input itself. In a whole network: input times gradient (LRP's z-rule)."""

    name = "x"
    label = "S_x"
    math_label = "$S_x$"
    place = 1
    colour = "brown"
    has_pattern = False
    no_pattern_reason = "S_x(x) = x leaves no residual, so rho says nothing about it"


class Filter(Estimator):
    """S_w: a = w / wᵀw. In a whole network: the w²-rule."""

    name = "w"
    label = "S_w"
    math_label = "$S_w$"
    place = 2
    colour = "green"

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        return _one_regime(*_normalised(weight, weight))


class Linear(Estimator):
    """S_a: a = cov[x, u] / var[u] (Eq. 3)."""

    name = "a"
    label = "S_a"
    math_label = "$S_a$"
    place = 3
    colour = "vermilion"
    from_data = True

    def fit(self, weight: Tensor, moments: Moments, generator: torch.Generator) -> Pattern:
        return _one_regime(*_normalised(moments.cov_xu, weight))


class TwoRegimes(Estimator):
    """S_a+- (Eq. 4): a₊ = (E₊[x u] - E₊[x] E[u]) / (wᵀ of the numerator), a₋ likewise (Eq. 7). The bias cancels."""

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
            pattern, defined = _normalised(numerator, weight)
            defined &= count > 0
            return pattern * defined[:, None], defined

        positive, has_positive = regime(m.xug, x_positive, fires)
        negative, has_negative = regime(m.xun, x_negative, rests)
        return Pattern(positive, negative, ~(has_positive & has_negative))


def by_name() -> dict[str, type[Estimator]]:
    """Every estimator of the suite by its name, in the order of tables and legends.

    >>> [kind.label for kind in by_name().values()]
    ['random', 'S_x', 'S_w', 'S_a', 'S_a+-']
    """
    return classes_by_name(Estimator, "pattern_bench.core")


def _normalised(direction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``direction / wᵀdirection`` (N, D), and where that is defined (N,); zero elsewhere."""
    denominator = (weight * direction).sum(1)
    defined = denominator.abs() > VANISHING * weight.norm(dim=1) * direction.norm(dim=1)
    safe = torch.where(defined, denominator, 1.0)
    return torch.where(defined[:, None], direction / safe[:, None], 0.0), defined


def _one_regime(pattern: Tensor, defined: Tensor) -> Pattern:
    return Pattern(pattern, pattern, ~defined)
