"""The interface of measures that sanity checks take of every pair of heat maps, and how they are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from pattern_bench.core.registry import classes_by_name


class Similarity(ABC):
    """Base of the measures of how alike two heat maps of one image are.

    A subclass in any module of this package is a row of ``sanity.csv`` and a panel of ``randomisation.png``.

    >>> import torch
    >>> measure = similarity_measures()["cosine"]()
    >>> measure.title, measure.compare(torch.ones(1, 2, 2), 3 * torch.ones(1, 2, 2)).item()
    ('cosine of heat maps', 1.0)
    """

    name: ClassVar[str]
    """In the column ``measure`` of ``sanity.csv``."""
    title: ClassVar[str]
    """In figures."""
    place: ClassVar[int] = 99
    """In tables and figures: lower stands first, equal ones by name."""

    @abstractmethod
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the similarity of each pair of heat maps, (B, H, W) and (B, H, W) to (B,) float64.

        It should not depend on a heat map's scale. Pairs with a map of zeros are left out by the caller.
        """


def similarity_measures() -> dict[str, type[Similarity]]:
    """Return the measures of this package by name, in the order of tables and figures.

    >>> list(similarity_measures())
    ['spearman_signed', 'spearman_absolute', 'ssim', 'cosine']
    """
    return classes_by_name(Similarity, "pattern_bench.metrics")
