"""Sums of a split, put together from its pieces."""

import pytest
import torch
from torch import nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.moments import Moments
from pattern_bench.errors import UserError
from pattern_bench.pipeline.moments import SplitMoments
from pattern_bench.storage.cache import Cache


def test_a_layer_that_no_image_of_a_split_runs_is_one_error(tmp_path):
    layer = nn.Linear(3, 2)
    some, none = Collector(layer, False), Collector(layer, False)
    x = torch.randn(5, 3)
    some.add(x, layer(x))
    pieces = [{"a": some.moments(), "b": none.moments()}, {"a": none.moments(), "b": none.moments()}]
    moments = SplitMoments(Cache(tmp_path), Moments.from_tensors, pieces)
    assert moments["a"].n.item() == 5
    with pytest.raises(UserError, match="layer b runs for none of the images of a split"):
        moments["b"]
