"""Mistakes from Python get one message."""

import copy

import pytest
import torch
from helpers.batches import loader
from torch import nn

import pattern_bench as pb
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient


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


def test_no_images_are_told_as_such(network, tmp_path):
    heat = {"mine": lambda model, inputs, targets: inputs}
    for shape in ((0, 3, 12, 12), (2, 3, 0, 12)):
        with pytest.raises(UserError, match=rf"images has no image \(its shape is \({shape[0]}, 3, {shape[2]}, 12\)\)"):
            pb.degradation(network, torch.ones(shape), heat, patch=4, steps=3)
        with pytest.raises(UserError, match="images has no image"):
            pb.draw_gallery(network, torch.ones(shape), heat, tmp_path / "gallery.png")


def test_networks_without_layers_or_values_are_told_as_such(network):
    x, none = torch.rand(2, 3, 12, 12), nn.Sequential(nn.ReLU(), nn.Flatten()).eval()
    with pytest.raises(UserError, match="the network runs no Conv1d, Conv2d, Conv3d or Linear layer"):
        pb.collect_moments(none, [x])
    moments = pb.collect_moments(network, [x])
    meta = copy.deepcopy(network).to("meta")
    for use in (
        lambda: pb.collect_moments(meta, [x]),
        lambda: pb.fit_patterns(meta, moments),
        lambda: pb.degradation(meta, x, {}, patch=4, steps=3),
        lambda: Gradient(meta).attribute(x),
    ):
        with pytest.raises(UserError, match=r"model=Sequential: 0.weight has no values, since it is on the device"):
            use()


def test_numbers_beyond_64_bits_are_out_of_range(network):
    x, heat = torch.rand(2, 3, 12, 12), {"mine": lambda model, inputs, targets: inputs}
    for target in (2**63, -(2**70)):
        with pytest.raises(UserError, match=f"target={target} is out of range: give the number of one of the"):
            pb.degradation(network, x, heat, target=target, patch=4, steps=3)
        with pytest.raises(UserError, match=f"gradient: target={target} is out of range"):
            Gradient(network).attribute(x, target=target)
    with pytest.raises(UserError, match=f"memory={2**70} is not possible: give a whole number from 1 to {2**63 - 1}"):
        pb.collect_moments(network, [x], memory=2**70)
