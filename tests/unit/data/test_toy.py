"""The toy data know their signal."""

import math

import torch

from pattern_bench.configuration.build import build
from pattern_bench.data.splits import make_splits


def splits(configure, *overrides, seed=0):
    return make_splits(build(configure(*overrides).data), seed)


def test_the_toy_data_know_their_signal(configure):
    source = build(configure("data=toy", "data.angle=30").data)
    pool, _ = source.pools()
    y = torch.tensor(pool.labels)
    distractor = pool.images - y[:, None] * source.signal.float()
    direction = distractor / distractor.norm(dim=1, keepdim=True)
    expected = torch.tensor([math.cos(math.radians(30)), math.sin(math.radians(30))])
    torch.testing.assert_close((direction @ expected).abs(), torch.ones(len(y)), atol=1e-5, rtol=0)
