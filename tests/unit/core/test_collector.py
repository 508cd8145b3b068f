import numpy as np
import pytest
import torch
from helpers.brute_force import GEOMETRIES, brute_neuron, brute_patches, collected
from torch import nn

from pattern_bench.core.collector import Collector


def test_every_sum_equals_brute_force(layer_and_input):
    layer, x = layer_and_input
    m = collected(layer, x)
    patches = brute_patches(layer, x)
    np.testing.assert_allclose(m.n, patches.shape[1])
    np.testing.assert_allclose(m.x, patches.sum(1), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(m.gram, patches.transpose(0, 2, 1) @ patches, rtol=1e-12, atol=1e-10)
    for neuron in range(layer.weight.shape[0]):
        patch, u, gate = brute_neuron(layer, x, neuron)
        expected = {
            "g": gate.sum(), "ug": u[gate].sum(), "un": u[~gate].sum(),
            "uug": (u[gate] ** 2).sum(), "uun": (u[~gate] ** 2).sum(),
            "xg": patch[gate].sum(0), "xug": u[gate] @ patch[gate], "xun": u[~gate] @ patch[~gate],
        }  # fmt: skip
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(m, name)[neuron], value, rtol=1e-11, atol=1e-10, err_msg=name)
    covariance = np.cov(patches[0].T, bias=True).reshape(m.cov_x[0].shape)
    np.testing.assert_allclose(m.cov_x[0], covariance, rtol=1e-9, atol=1e-10)


def test_float32_products_keep_five_digits(layer_and_input):
    layer, x = layer_and_input
    exact = collected(layer, x).tensors()
    single = collected(layer.float(), x.float()).tensors()
    for name, value in exact.items():
        assert single[name].dtype == torch.float64
        assert (single[name] - value).norm() <= 1e-5 * value.norm(), name


def test_batches_merge_by_addition(layer_and_input):
    layer, x = layer_and_input
    whole = collected(layer, x)
    parts = [collected(layer, part) for part in (x[1:], x[:1])]
    for merged in (parts[0].add_(parts[1]), collected(layer, *x.split(1))):
        for name, value in whole.tensors().items():
            torch.testing.assert_close(getattr(merged, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimension", [1, 2])
def test_a_large_mean_costs_no_digit(dimension):
    """Activations with mean 1,000 and deviation 1: cov keeps 6 digits, in float32 products."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if dimension == 1 else nn.Conv2d(3, 4, 3)
    x = torch.randn(20_000, 6) if dimension == 1 else torch.randn(40, 3, 20, 20)
    x += 1000
    layer.requires_grad_(False)
    m = collected(layer, *x.split(len(x) // 4))
    patches = brute_patches(layer, x)[0]
    expected = np.cov(patches.T, bias=True)
    assert np.abs(m.cov_x[0].numpy() - expected).max() <= 5e-6 * np.abs(expected).max()
    without = collected(layer, *x.split(len(x) // 4), gram=False)
    w = layer.weight.flatten(1).double().numpy()
    for found in (m, without):
        assert np.abs(found.cov_xu.numpy() - w @ expected).max() <= 2e-5 * np.abs(w @ expected).max()


def test_memory_does_not_grow_with_images():
    layer = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    collector = Collector(layer, gram=True)
    sizes = []
    for _ in range(3):
        x = torch.randn(2, 8, 12, 12)
        collector.add(x, layer(x))
        sizes.append(sum(t.numel() for t in collector.moments().tensors().values()))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("name", ["conv2d", "grouped", "depthwise", "same", "reflect", "conv1d", "conv3d"])
def test_sums_over_sampled_positions_are_unbiased(name, monkeypatch):
    """Averaged over seeds they approach the exact sums, as fast as their spread allows."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 3)
    torch.manual_seed(0)
    layer, shape = GEOMETRIES[name]()
    layer = layer.double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64).relu() + 0.1
    exact = collected(layer, x).tensors()
    draws = []
    for seed in range(200):
        collector = Collector(layer, True, positions=0.3, seed=seed)
        for part in x.split(1):
            collector.add(part, layer(part))
        draws.append(collector.moments().tensors())
    for key, value in exact.items():
        found = torch.stack([draw[key] for draw in draws])
        error = (found.mean(0) - value).abs()
        assert (error <= 5 * found.std(0) / 200**0.5 + 1e-9 * value.abs().max()).all(), key
    assert all(draw["n"] == exact["n"] for draw in draws)
    assert not torch.equal(draws[0]["gram"], exact["gram"])


def test_layers_with_few_positions_are_not_sampled():
    layer = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    sampled = Collector(layer, True, positions=0.1)
    sampled.add(x, layer(x))
    assert torch.equal(sampled.moments().gram, collected(layer, x).gram)


def test_a_large_mean_costs_no_digit_in_sampled_positions():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = torch.randn(8, 3, 40, 40) + 1000
    m = Collector(layer, True, positions=0.5)
    m.add(x, layer(x))
    covariance = m.moments().cov_x[0]
    assert (covariance - torch.eye(27).double()).abs().max() < 0.1


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1.0, 0.5])
def test_a_collector_goes_on_to_the_bit(layer_and_input, gram, positions, monkeypatch):
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layer, x = layer_and_input
    layer, x = layer.float(), x.float() + 100 * (len(x) % 2)  # with a large mean it is summed about that
    y = layer(x)
    half = len(x) // 2
    whole, first, second = (Collector(layer, gram, positions=positions, seed=3) for _ in range(3))
    for part in (slice(half), slice(half, None)):
        whole.add(x[part], y[part])
    first.add(x[:half], y[:half])
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    second.add(x[half:], y[half:])
    one, other = whole.moments().tensors(), second.moments().tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
