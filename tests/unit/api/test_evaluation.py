"""Patterns and ρ from Python equal brute force."""

import pytest
import torch
from helpers.batches import loader
from helpers.brute_force import brute_neuron, brute_rho

import pattern_bench as pb


def test_patterns_and_rho_equal_brute_force(network):
    images, probe, test = (torch.cat([x for x, _ in loader(seed)]) for seed in (0, 1, 2))
    moments = pb.collect_moments(network, loader(0), layers="0")
    assert list(moments) == ["0"]
    patterns = pb.fit_patterns(network, moments, estimator="a_plus_minus")
    for neuron in range(4):
        patch, u, gate = brute_neuron(network[0], images, neuron)
        numerator = (patch[gate] * u[gate, None]).mean(0) - patch[gate].mean(0) * u.mean()
        w = network[0].weight[neuron].detach().double().numpy().ravel()
        found = patterns["0"].positive[neuron].flatten().numpy()
        assert found == pytest.approx(numerator / (w @ numerator), abs=1e-5)
    rho = pb.evaluate(
        network, patterns, probe=pb.collect_moments(network, loader(1)), test=pb.collect_moments(network, loader(2))
    )
    ridge = 1e-4 * float(pb.collect_moments(network, loader(1))["0"].cov_x[0].diagonal().mean())
    layer = network[0].double().requires_grad_(False)
    flat = type(patterns["0"])(*(p.flatten(1).double() for p in (patterns["0"].positive, patterns["0"].negative)),
                               patterns["0"].dead)  # fmt: skip
    for neuron in range(4):
        expected = brute_rho(layer, probe.double(), test.double(), flat, neuron, ridge)
        assert float(rho["0"][neuron]) == pytest.approx(expected, abs=1e-3)
