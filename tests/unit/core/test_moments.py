"""Moments that do not add up are told apart."""

import pytest
from torch import nn

from pattern_bench.core.collector import Collector


def test_moments_with_and_without_gram_do_not_add_up():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="do not add up"):
        Collector(layer, True).moments().add_(Collector(layer, False).moments())
