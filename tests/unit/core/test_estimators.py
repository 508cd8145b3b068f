import math

import numpy as np
import pytest
import torch
from helpers.brute_force import FITTED, brute_neuron
from torch import nn

from pattern_bench.core import estimators
from pattern_bench.core.collector import Collector


def fitted(layer, x, estimator, seed=0):
    collector = Collector(layer, gram=False)
    collector.add(x, layer(x))
    m = collector.moments()
    generator = torch.Generator().manual_seed(seed)
    return FITTED[estimator]().fit(layer.weight.detach().flatten(1).double(), m, generator)


def brute_pattern(estimator, w, patch, u, gate):
    """a₊ and a₋ from samples, straight from the definitions."""
    if estimator == "w":
        return w / (w @ w), w / (w @ w)
    if estimator == "a":
        a = ((patch - patch.mean(0)) * (u - u.mean())[:, None]).mean(0) / u.var()
        return a, a

    def regime(which):
        numerator = (patch[which] * u[which, None]).mean(0) - patch[which].mean(0) * u.mean()
        return numerator / (w @ numerator)

    return regime(gate), regime(~gate)


@pytest.mark.parametrize("estimator", ["w", "a", "a_plus_minus"])
def test_patterns_equal_brute_force(layer_and_input, estimator):
    layer, x = layer_and_input
    pattern = fitted(layer, x, estimator)
    for neuron in range(layer.weight.shape[0]):
        patch, u, gate = brute_neuron(layer, x, neuron)
        if pattern.dead[neuron]:
            assert estimator == "a_plus_minus"
            assert gate.all() or not gate.any()
            continue
        w = layer.weight[neuron].numpy().ravel()
        positive, negative = brute_pattern(estimator, w, patch, u, gate)
        np.testing.assert_allclose(pattern.positive[neuron], positive, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(pattern.negative[neuron], negative, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", FITTED)
def test_filter_times_pattern_is_one(layer_and_input, estimator):
    """wᵀa = 1, so that wᵀS(x) = wᵀx."""
    layer, x = layer_and_input
    pattern, w = fitted(layer, x, estimator), layer.weight.flatten(1)
    live = ~pattern.dead
    for part in (pattern.positive, pattern.negative):
        torch.testing.assert_close((w * part).sum(1)[live], torch.ones(int(live.sum()), dtype=torch.float64))


@pytest.mark.parametrize("angle", [20.0, 45.0, 110.0])
def test_toy_example_in_closed_form(angle):
    """x = a_s y + a_d ε: the filter that undoes the distractor turns with it; S_a finds a_s, S_w does not."""
    phi = math.radians(angle)
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(20_000, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(20_000, dtype=torch.float64, generator=generator)
    noise -= noise.mean() + y * ((noise * (y - y.mean())).mean() / y.var(correction=0))  # exactly uncorrelated
    distractor = torch.tensor([math.cos(phi), math.sin(phi)], dtype=torch.float64)
    x = y[:, None] * torch.tensor([1.0, 0.0]) + noise[:, None] * distractor
    layer = nn.Linear(2, 1).double()
    layer.weight.data = torch.tensor([[1.0, -1 / math.tan(phi)]], dtype=torch.float64)
    layer.bias.data.zero_()
    torch.testing.assert_close(layer(x).squeeze(1), y)
    signal = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(fitted(layer, x, "a").positive, signal, rtol=0, atol=1e-10)
    w = layer.weight.detach()
    torch.testing.assert_close(fitted(layer, x, "w").positive, w / (w @ w.T))
    assert (fitted(layer, x, "w").positive - signal).abs().max() > 0.1


def test_neurons_that_never_or_always_fire_have_no_second_pattern():
    layer = nn.Linear(2, 4).double().requires_grad_(False)
    layer.bias.copy_(torch.tensor([-100.0, 100.0, 0.0, 0.0]))
    layer.weight[3] = 0
    x = torch.randn(40, 2, dtype=torch.float64)
    pattern = fitted(layer, x, "a_plus_minus")
    assert pattern.dead.tolist() == [True, True, False, True]
    assert not pattern.positive[0].any()
    assert pattern.negative[0].any()
    assert pattern.positive[1].any()
    assert not pattern.negative[1].any()
    assert fitted(layer, x, "a").dead.tolist() == [False, False, False, True]
    assert fitted(layer, x, "w").dead.tolist() == [False, False, False, True]
    assert all(torch.isfinite(t.double()).all() for t in vars(pattern).values())


def test_the_bias_moves_the_gate_and_nothing_else():
    """With the gate held, a₊ is the same for y = u + b as for u (the bias cancels in Eq. 7)."""
    draw = np.random.default_rng(0)
    x, w, b = draw.normal(size=(200, 3)), draw.normal(size=3), 0.7
    u, gate = x @ w, x @ w + b > 0
    of_u = brute_pattern("a_plus_minus", w, x, u, gate)[0]
    of_y = brute_pattern("a_plus_minus", w, x, u + b, gate)[0]
    np.testing.assert_allclose(of_u, of_y)


def test_random_directions_follow_the_seed():
    layer, x = nn.Linear(3, 2).double(), torch.randn(20, 3, dtype=torch.float64)
    one, again, other = (fitted(layer, x, "random", seed).positive for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_new_estimator_is_a_subclass():
    with pytest.raises(NotImplementedError):
        estimators.Estimator().fit(None, None, None)
