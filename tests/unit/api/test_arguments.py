"""Mistakes from Python get one message."""

import pytest
import torch
from helpers.batches import loader

import pattern_bench as pb
from pattern_bench.errors import UserError


def test_mistakes_get_one_message(network):
    moments = pb.collect_moments(network, loader(), gram=False)
    patterns = pb.fit_patterns(network, moments)
    with pytest.raises(UserError, match="estimator=b is unknown"):
        pb.fit_patterns(network, moments, "b")
    with pytest.raises(UserError, match="estimator=x has no patterns"):
        pb.fit_patterns(network, moments, "x")
    with pytest.raises(UserError, match="loader yields no batch"):
        pb.collect_moments(network, [])
    with pytest.raises(UserError, match="loader yields str"):
        pb.collect_moments(network, ["image"])
    with pytest.raises(UserError, match="no Gram matrix"):
        pb.evaluate(network, patterns, moments, moments)
    with pytest.raises(UserError, match="is not measured here"):
        pb.evaluate(network, patterns, moments, moments, "positive")
    with pytest.raises(UserError, match="training mode"):
        pb.PatternNet(network.train(), patterns).attribute(loader()[0][0])
    with pytest.raises(UserError, match="holds NaN"):
        pb.PatternNet(network.eval(), patterns).attribute(torch.full((1, 3, 12, 12), torch.nan))
    with pytest.raises(UserError, match="needs patterns"):
        pb.PatternAttribution(network, {})
    with pytest.raises(AttributeError, match="no attribute 'patterns'"):
        pb.patterns  # noqa: B018
