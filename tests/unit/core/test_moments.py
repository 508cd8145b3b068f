"""Moments that do not add up are told apart."""

import pytest
from torch import nn

from pattern_bench.core.collector import Collector


def test_moments_with_and_without_gram_do_not_add_up():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="do not add up"):
        Collector(layer, True).moments().add_(Collector(layer, False).moments())


def test_moments_of_no_patch_have_no_covariance():
    with pytest.raises(ValueError, match="these moments are of no patch, since no image runs the layer"):
        _ = Collector(nn.Linear(2, 2), True).moments().cov_x
