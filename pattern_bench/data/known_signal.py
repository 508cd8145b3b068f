"""Images whose signal and distractor are known for every pixel: two tetrominoes in a 1/f background, and suppressors.

In the spirit of Haufe et al. 2014 ("On the interpretation of weight vectors of linear models in multivariate
neuroimaging"), Wilming et al. 2022 ("Scrutinizing XAI using linear ground-truth data with suppressor variables") and
Clark et al. 2024 ("XAI-TRIS"), from which the tetrominoes, their places and the weights of the sum are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pattern_bench.configuration.rules import Rule, check_arguments, name_among, number_from_zero, whole_number
from pattern_bench.data.base import DRAWN, Pool, Source, TensorPool

SCENARIOS = ("linear", "multiplicative", "translation")
UNITS = 8
"""An image's side is counted in so many units; a square of a tetromino is one wide."""
T = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
L = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
T_AT, L_AT = (1, 1), (4, 5)
SUPPRESSORS = {"linear": [(1, 5), (5, 1)], "multiplicative": [(1, 5), (5, 1)], "translation": [(6, 3)]}
"""Where squares of 2×2 units show the distractor alone: as many pixels as show the class. In ``translation`` no
tetromino reaches the two lowest rows of units."""


@dataclass(frozen=True)
class KnownSignal:
    """Images (n of ``side`` pixels) and their parts: ``images = signal + distractor``.

    Attributes:
        images: (n, 1, side, side) float32, scaled so that the mean square of all pixels is 1.
        labels: (n,) int64, 0 for T and 1 for L, as many of one as of the other (within one).
        signal: (n, 1, side, side), the part of each image that depends on its class, see :func:`draw`.
        distractor: (n, 1, side, side), the rest: background, suppressor, and what both classes share.
        truth: (n, side, side) bool, the pixels where the class shows.
        suppressor: (side, side) bool, pixels outside of every truth mask that show the distractor alone: they tell
            nothing of the class, and a filter needs them to cancel the distractor elsewhere.
    """

    images: Tensor
    labels: Tensor
    signal: Tensor
    distractor: Tensor
    truth: Tensor
    suppressor: Tensor


def draw(scenario: str, side: int, signal: float, suppressor: float, samples: int, seed: int) -> KnownSignal:
    """Draw the images of one scenario.

    With s = 1 for T and -1 for L, the tetrominoes T and L as images of zeros and ones, B a Gaussian background whose
    amplitude falls with 1/f, ε one Gaussian number for each image, and α = ``signal``:

    - ``linear``: x = α s (T - L) + (1-α) B + D. Both stand at fixed places, T positive where L is negative: XAI-TRIS's
      images less their mean over the classes, since the absence of one tells as much as the presence of the other.
    - ``multiplicative``: x = (1 - α P) B + D with P = T or L. The mean over the classes is (1 - α (T+L)/2) B, which is
      distractor; the signal is the rest, -α s (T-L)/2 B. It changes its sign with the background.
    - ``translation``: x = α P + (1-α) B + D with P = T or L at any place above the suppressor. The signal is α P.

    As in XAI-TRIS, T - L, P and B are divided by their Frobenius norm over all images first (here: so that the mean
    square norm of an image is 1); in ``multiplicative`` only B is. D = β v ε (C + R) is the suppressor's distractor,
    β = ``suppressor``: C = T - L where they stand in that image, R the suppressor's pixels, v the root mean square of
    the signal on the truth masks. It has the direction in which the classes differ, so that only R can cancel it:
    the example x₁ = s + ε, x₂ = ε of Haufe et al.

    >>> known = draw("linear", side=8, signal=0.3, suppressor=1.0, samples=4, seed=0)
    >>> known.images.shape, bool(torch.allclose(known.images, known.signal + known.distractor))
    (torch.Size([4, 1, 8, 8]), True)

    Args:
        scenario: one of ``SCENARIOS``.
        side: pixels, at least 8; beyond the largest multiple of 8 there is background alone.
        signal: α, above 0 and below 1.
        suppressor: β, the deviation of the distractor in units of the signal's; 0 for none.
        samples: number of images.
        seed: of all draws; the same seed gives the same images.

    Raises:
        UserError: where a setting is not possible.
    """
    check(scenario, side, signal, suppressor, samples)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples)[torch.randperm(samples, generator=generator)] % 2
    t, l = _moved(side, samples, generator) if scenario == "translation" else _fixed(side)
    background = _background(side, samples, generator)
    epsilon = torch.randn(samples, generator=generator)[:, None, None]
    is_t = (labels == 0)[:, None, None]
    s, shown, contrast = torch.where(is_t, 1.0, -1.0), torch.where(is_t, t, l), t - l
    if scenario == "linear":
        made, rest = signal * _normed(s * contrast), (1 - signal) * background
    elif scenario == "multiplicative":
        made, rest = -signal * s * contrast / 2 * background, (1 - signal * (t + l) / 2) * background
    else:
        made, rest = signal * _normed(shown), (1 - signal) * background
    truth = (shown if scenario == "translation" else contrast.expand_as(made)) != 0
    region = _suppressor(scenario, side)
    amplitude = made[truth].square().mean().sqrt()
    rest = rest + suppressor * amplitude * epsilon * (contrast + region)
    scale = 1 / (made + rest).square().mean().sqrt()
    made, rest = (part[:, None] * scale for part in (made, rest))
    return KnownSignal(made + rest, labels, made, rest, truth, region)


RULES = (
    name_among("data.scenario", SCENARIOS),
    whole_number("data.side", UNITS),
    whole_number("data.samples", 2),
    Rule("data.signal", lambda share: isinstance(share, float) and 0 < share < 1,
         "give the signal's share, above 0 and below 1"),
    number_from_zero("data.suppressor", "give a number of at least 0, 0 for none"),
)  # fmt: skip


def check(scenario: str, side: int, signal: float, suppressor: float, samples: int) -> None:
    """
    Raises:
        UserError: where :func:`draw` cannot be given these.
    """
    for rule, value in zip(RULES, (scenario, side, samples, signal, suppressor), strict=True):
        rule.check(value)


def _fixed(side: int) -> tuple[Tensor, Tensor]:
    """T and L at their places, (1, side, side) each."""
    unit = side // UNITS
    return _placed(T, [(T_AT[0] * unit, T_AT[1] * unit)], side), _placed(L, [(L_AT[0] * unit, L_AT[1] * unit)], side)


def _moved(side: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """T and L as they stand, or would stand, in each image, above the suppressor: (n, side, side) each."""
    unit = side // UNITS
    rows = torch.randint(3 * unit + 1, (samples,), generator=generator).tolist()
    columns = torch.randint(side - 2 * unit + 1, (samples,), generator=generator).tolist()
    at = list(zip(rows, columns, strict=True))
    return _placed(T, at, side), _placed(L, at, side)


def _placed(shape: Tensor, at: list[tuple[int, int]], side: int) -> Tensor:
    """The shape with squares of one unit, its top left pixel ``at`` each place: (len(at), side, side)."""
    large = torch.kron(shape, torch.ones(side // UNITS, side // UNITS))
    images = torch.zeros(len(at), side, side)
    for image, (row, column) in zip(images, at, strict=True):
        image[row : row + len(large), column : column + large.shape[1]] = large
    return images


def _suppressor(scenario: str, side: int) -> Tensor:
    at = [(row * (side // UNITS), column * (side // UNITS)) for row, column in SUPPRESSORS[scenario]]
    return _placed(torch.ones(2, 2), at, side).any(0)


def _background(side: int, samples: int, generator: torch.Generator) -> Tensor:
    """(n, side, side), cut from images of twice the side, whose opposite edges would otherwise be alike."""
    frequency = torch.hypot(torch.fft.fftfreq(2 * side)[:, None], torch.fft.rfftfreq(2 * side)[None])
    # The mean of the large image would have an infinite amplitude.
    amplitude = 1 / frequency.clamp(min=1 / (2 * side))
    background = torch.empty(samples, side, side)
    for part in background.split(256):
        white = torch.randn(len(part), 2 * side, 2 * side, generator=generator)
        part.copy_(torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=white.shape[1:])[:, :side, :side])
    return _normed(background)


def _normed(images: Tensor) -> Tensor:
    """Divided by a number, so that the mean square norm of an image is 1."""
    return images / images.flatten(1).square().sum(1).mean().sqrt()


class Known(Source):
    """The images of :func:`draw` as a data set; :attr:`known` has their signal and distractor.

    Args:
        scenario: ``linear``, ``multiplicative`` or ``translation``.
        side: pixels.
        signal: α, the signal's share.
        suppressor: β, the distractor's strength in units of the signal's.
        samples: number of images.
        data_seed: seed of the draws.

    Raises:
        UserError: where a setting is not possible.
    """

    def __init__(
        self,
        *,
        scenario: str,
        side: int,
        signal: float,
        suppressor: float,
        samples: int,
        data_seed: int,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check(scenario, side, signal, suppressor, samples)
        check_arguments(DRAWN, data_seed=data_seed)
        self.settings = (scenario, side, signal, suppressor, samples, data_seed)
        if scenario == "linear":
            t, l = _fixed(side)
            self.signal = (t - l).flatten().double()

    @property
    def known(self) -> KnownSignal:
        """All images with their signal and distractor, drawn anew."""
        return draw(*self.settings)

    def pools(self) -> tuple[Pool, Pool | None]:
        known = self.known
        return TensorPool(known.images, known.labels, 2), None
