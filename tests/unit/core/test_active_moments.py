"""ρ where a neuron fires, in closed form, against brute force over the samples where it does."""

import numpy as np
import pytest
import torch
from torch import nn

from pattern_bench.core.active_moments import FiringCollector, FiringMoments, draw_neurons, firing_rho
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Linear, Random, TwoRegimes
from pattern_bench.core.layers import geometry_of, patches
from pattern_bench.core.network import collecting

LAYERS = {
    "dense": (nn.Linear(7, 6), (400, 7)),
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (30, 3, 6, 6)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), padding=1, groups=2), (40, 4, 9, 8)),
    "one dimension": (nn.Conv1d(4, 4, 3), (40, 4, 11)),
}


def _network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double()


def _inputs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.relu() + 0.3 * x.roll(1, 1) + 2


def _fired(layer: nn.Module, x: torch.Tensor, neuron: int) -> np.ndarray:
    """(samples, D), the patches where the neuron fires."""
    geometry = geometry_of(layer)
    with torch.no_grad():
        y = layer(x).flatten(2).movedim(1, 2).reshape(-1, len(layer.weight)) if geometry.kernel else layer(x)
    p = patches(x, geometry) if geometry.kernel else x[None]
    return p[neuron // (len(layer.weight) // geometry.groups)][y[:, neuron] > 0].numpy()


def _sums(layer: nn.Module, neurons: torch.Tensor, batches, **settings) -> FiringMoments:
    collector = FiringCollector(layer, neurons, **settings)
    with torch.no_grad(), collecting(layer, {"": collector}):
        for batch in batches:
            layer(batch)
    return collector.moments()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("estimator", [Random(), Linear(), TwoRegimes()], ids=lambda e: e.name)
def test_rho_where_neurons_fire_is_that_of_least_squares(name, estimator):
    layer, shape = LAYERS[name]
    layer = _network(layer)
    fit, probe, test = (_inputs(shape, seed) for seed in range(3))
    with torch.no_grad():  # each fires for about half of its samples
        layer.bias -= layer(fit).transpose(0, 1).flatten(1).mean(1)
    collector = Collector(layer, gram=False)
    with torch.no_grad():
        collector.add(fit, layer(fit))
    weight = layer.weight.detach().flatten(1)
    pattern = estimator.fit(weight, collector.moments(), torch.Generator().manual_seed(0))
    neurons = torch.tensor([0, 1, len(weight) - 1])
    some = type(pattern)(pattern.positive[neurons], pattern.negative[neurons], pattern.dead[neurons])
    sums = [_sums(layer, neurons, x.split(17)) for x in (probe, test)]
    ridge = 1e-3
    values, largest = firing_rho(*sums, weight[neurons], some, ridge)
    assert largest == ridge
    for place, neuron in enumerate(neurons.tolist()):
        w, a = weight[neuron].numpy(), pattern.positive[neuron].numpy()
        (d, y), (d_test, y_test) = (
            (x - np.outer(x @ w, a), x @ w) for x in (_fired(layer, part, neuron) for part in (probe, test))
        )
        centred = d - d.mean(0)
        scale = np.cov(_fired(layer, probe, neuron).T, bias=True).trace() / d.shape[1]
        v = np.linalg.solve(
            centred.T @ centred / len(d) + ridge * scale * np.eye(d.shape[1]), centred.T @ (y - y.mean()) / len(d)
        )
        assert float(values[place]) == pytest.approx(1 - np.corrcoef(d_test @ v, y_test)[0, 1], abs=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_those_of_the_patches_however_they_come(name):
    layer, shape = LAYERS[name]
    layer, x = _network(layer), _inputs(shape, 0)
    neurons = torch.arange(len(layer.weight))
    whole = _sums(layer, neurons, [x])
    for place, neuron in enumerate(neurons.tolist()):
        p = _fired(layer, x, neuron)
        p = np.concatenate([p, np.ones((len(p), 1))], 1)
        np.testing.assert_allclose(whole.sums[place].numpy(), p.T @ p, rtol=1e-9, atol=1e-9)
    parts = _sums(layer, neurons, x[:10].split(3), memory=1).add_(_sums(layer, neurons, [x[10:]]))
    torch.testing.assert_close(parts.sums, whole.sums)
    torch.testing.assert_close(whole.times(3.0).sums, 3 * whole.sums)


def test_a_large_mean_costs_no_digits():
    layer = _network(nn.Linear(5, 3)).float()
    x = torch.randn(4000, 5, dtype=torch.float64) + 3000
    y = x @ layer.weight.detach().double().T
    with torch.no_grad():
        layer.bias.copy_(-y.mean(0))
    fired = (layer(x.float()) > 0)[:, 1]
    sums = _sums(layer, torch.tensor([1]), x.float().split(500))
    n, mean = sums.sums[0, -1, -1], sums.sums[0, -1, :-1] / sums.sums[0, -1, -1]
    covariance = sums.sums[0, :-1, :-1] / n - mean[:, None] * mean
    torch.testing.assert_close(covariance, x.float().double()[fired].T.cov(correction=0), rtol=1e-4, atol=1e-4)


def test_sampled_positions_estimate_the_sums():
    layer = _network(nn.Conv2d(2, 3, 3, padding=1))
    x = _inputs((60, 2, 24, 24), 0)
    neurons = torch.tensor([0, 2])
    exact = _sums(layer, neurons, [x])
    sampled = _sums(layer, neurons, x.split(7), positions=0.5, seed=4)
    again = _sums(layer, neurons, x.split(20), positions=0.5, seed=4)
    torch.testing.assert_close(sampled.sums, again.sums)
    error = (sampled.sums - exact.sums).norm() / exact.sums.norm()
    assert 0 < float(error) < 0.02


def test_a_collector_that_is_taken_up_again_goes_on_to_the_bit():
    layer = _network(nn.Conv2d(2, 3, 3, padding=1))
    batches = _inputs((20, 2, 24, 24), 0).split(5)
    neurons = torch.tensor([1])
    first, whole = (FiringCollector(layer, neurons, positions=0.6, seed=2) for _ in range(2))
    with torch.no_grad():
        for batch in batches:
            whole.add(batch, layer(batch))
        for batch in batches[:2]:
            first.add(batch, layer(batch))
        second = FiringCollector(layer, neurons, positions=0.6, seed=9)
        second.restore({name: tensor.clone() for name, tensor in first.state().items()})
        for batch in batches[2:]:
            second.add(batch, layer(batch))
    assert torch.equal(whole.moments().sums, second.moments().sums)


def test_a_neuron_that_never_fires_has_no_rho():
    layer = _network(nn.Linear(4, 2))
    with torch.no_grad():
        layer.bias[0] = -1e6
    x = torch.randn(200, 4, dtype=torch.float64)
    collector = Collector(layer, gram=False)
    with torch.no_grad():
        collector.add(x, layer(x))
    weight = layer.weight.detach()
    pattern = Linear().fit(weight, collector.moments(), torch.Generator())
    sums = _sums(layer, torch.arange(2), [x])
    values, _ = firing_rho(sums, sums, weight, pattern, 1e-4)
    assert values.isnan().tolist() == [True, False]


def test_what_is_not_finite_is_noticed():
    layer = _network(nn.Linear(4, 2))
    for bad in (float("nan"), float("inf"), 1.0):
        collector = FiringCollector(layer, torch.arange(2))
        x = torch.randn(9, 4, dtype=torch.float64)
        x[3, 2] = bad
        with torch.no_grad():
            collector.add(x, layer(x))
        assert bool(collector.finite) == (bad == 1.0)


def test_neurons_are_drawn_once_each_in_order():
    drawn = draw_neurons(50, 8, torch.Generator().manual_seed(0)).tolist()
    assert len(set(drawn)) == 8
    assert drawn == sorted(drawn)
    assert draw_neurons(5, 8, torch.Generator()).tolist() == list(range(5))


@pytest.mark.parametrize(
    "sums", [torch.zeros(2, 3, 4), torch.zeros(2, 3, 3), -torch.ones(2, 3, 3).double(), torch.zeros(3, 3).double()]
)
def test_what_are_no_sums_is_refused(sums):
    sums = sums.double() if sums.shape == (2, 3, 4) else sums
    with pytest.raises(ValueError, match="moments of firing neurons"):
        FiringMoments.from_tensors({"sums": sums})
    with pytest.raises(ValueError, match="moments of firing neurons"):
        FiringMoments.from_tensors({"sums": sums, "x": sums})
