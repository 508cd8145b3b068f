"""Patterns are saved, and refused where they do not fit."""

import copy

import pytest
import torch
from helpers.batches import loader
from torch import nn

import pattern_bench as pb
from pattern_bench.errors import UserError


def test_patterns_are_saved_and_refused_where_they_do_not_fit(network, tmp_path):
    patterns = pb.fit_patterns(network, pb.collect_moments(network, loader(), gram=False))
    patterns.save(tmp_path / "p.safetensors")
    loaded = pb.load_patterns(tmp_path / "p.safetensors", network)
    assert loaded.estimator == "a_plus_minus"
    for layer, pattern in patterns.items():
        assert torch.equal(loaded[layer].positive, pattern.positive)
        assert torch.equal(loaded[layer].dead, pattern.dead)
    shorter = copy.deepcopy(network[:3])
    with torch.no_grad():
        network[2].weight.add_(1)
    with pytest.raises(UserError, match="layer 2 has other weights"):
        pb.load_patterns(tmp_path / "p.safetensors", network)
    network[2] = nn.Conv2d(4, 5, 1)
    with pytest.raises(UserError, match=r"layer 2 has shape \(5, 4, 3, 3\) and its weight \(5, 4, 1, 1\)"):
        pb.load_patterns(tmp_path / "p.safetensors", network)
    with pytest.raises(UserError, match="patterns of layer 6, which Sequential lacks"):
        pb.load_patterns(tmp_path / "p.safetensors", shorter)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        pb.load_patterns(tmp_path / "bad.safetensors", network)
    with pytest.raises(UserError, match="is not a file"):
        pb.load_patterns(tmp_path / "none.safetensors", network)
