import numpy as np
import pytest
import torch
from conftest import brute_neuron, brute_patches
from torch import nn

from pattern_bench.core.moments import Moments
from pattern_bench.core.network import collecting


def collected(layer, *batches, gram=True):
    moments = Moments.zeros(layer, gram)
    for x in batches:
        moments.update_(layer, x, layer(x))
    return moments


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


def test_moments_with_and_without_gram_do_not_add_up():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="do not add up"):
        Moments.zeros(layer, True).add_(Moments.zeros(layer, False))


def test_a_gram_in_chunks_equals_one_product(monkeypatch):
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    whole = collected(layer, x)
    monkeypatch.setattr("pattern_bench.core.moments.GRAM_CHUNK_BYTES", 1)
    torch.testing.assert_close(collected(layer, x).gram, whole.gram)


def test_hooks_count_every_call_and_leave_nothing_behind():
    """A shared layer followed by an in-place ReLU: expectations run over both calls, on pre-activations."""
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.ReLU(inplace=True)).requires_grad_(False)
    x = torch.randn(50, 3, dtype=torch.float64)
    m = {"0": Moments.zeros(shared, True)}
    with collecting(model, m):
        model(x)
    assert not shared._forward_hooks
    both = torch.cat([x, shared(x).relu()])
    torch.testing.assert_close(m["0"].gram[0], both.T @ both)
    torch.testing.assert_close(m["0"].g, (shared(both) > 0).double().sum(0))
    with pytest.raises(RuntimeError), collecting(model, m):
        model(torch.zeros(1, 4, dtype=torch.float64))
    assert not shared._forward_hooks
