import numpy as np
import pytest
import torch
from helpers.brute_force import FITTED, brute_rho, sums
from torch import nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.probe_closed_form import CLOSED_FORM, Probe, Target, rho


@pytest.mark.parametrize("criterion", CLOSED_FORM)
@pytest.mark.parametrize("estimator", FITTED)
def test_rho_equals_brute_force_least_squares(layer_and_input, estimator, criterion):
    layer, x = layer_and_input
    if layer.bias is not None:
        layer.bias.mul_(3)
    torch.manual_seed(1)
    probe_x, test_x = (x.flip(0) + 0.3 * torch.randn_like(x) for _ in range(2))
    fit = sums(layer, x)
    pattern = FITTED[estimator]().fit(layer.weight.flatten(1), fit, torch.Generator().manual_seed(0))
    fitted = Probe(sums(layer, probe_x), 1e-3)
    target = Target(criterion, layer.bias)
    values = rho(fitted.direction(pattern, target), sums(layer, test_x), pattern, target)
    diagonal = sums(layer, probe_x).cov_x.diagonal(dim1=1, dim2=2).mean(1)
    per_group = layer.weight.shape[0] // len(diagonal)
    for neuron in range(layer.weight.shape[0]):
        ridge = 1e-3 * float(diagonal[neuron // per_group])
        expected = brute_rho(layer, probe_x, test_x, pattern, neuron, ridge, criterion)
        assert float(values[neuron]) == pytest.approx(expected, abs=1e-7, nan_ok=True)


def test_rho_is_one_for_the_exact_signal_and_low_for_the_filter():
    """Toy: on the samples that the pattern was fitted on, S_a leaves nothing and S_w leaves a lot."""
    torch.manual_seed(0)
    y, noise = torch.rand(4000, dtype=torch.float64) - 0.5, torch.randn(4000, dtype=torch.float64)
    x = torch.stack([y + noise, noise], 1)
    layer = nn.Linear(2, 1, bias=False).double().requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    m = sums(layer, x)
    probe = Probe(m, 1e-8)
    value = {}
    for name in ("a", "w"):
        pattern = FITTED[name]().fit(layer.weight, m, torch.Generator())
        value[name] = float(rho(probe.direction(pattern), m, pattern))
    assert value["a"] == pytest.approx(1, abs=1e-6)
    # The residual of S_w is the multiple (y/2 + ε) of (1, 1): corr(y, y/2 + ε) in closed form.
    expected = 1 - float(torch.corrcoef(torch.stack([y, y / 2 + noise]))[0, 1].abs())
    assert value["w"] == pytest.approx(expected, abs=1e-6)


def test_dead_inputs_and_duplicates_are_no_obstacle():
    """A singular Σ: an input that is always 0 and one that repeats another."""
    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64)
    x[:, 1], x[:, 3] = 0, x[:, 2]
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    m = sums(layer, x)
    pattern = FITTED["a"]().fit(layer.weight, m, torch.Generator())
    values = rho(Probe(m, 1e-6).direction(pattern), m, pattern)
    assert torch.isfinite(values).all()
    expected = [brute_rho(layer, x, x, pattern, n, 1e-6 * float(m.cov_x[0].diagonal().mean())) for n in range(3)]
    # The residual of S_a is uncorrelated with y on its own samples, whatever v reads from it is rounding.
    assert np.allclose(expected, 1, atol=1e-3)
    assert np.allclose(values, 1, atol=1e-3)


def test_inputs_that_never_vary_leave_rho_undefined():
    layer = nn.Linear(2, 2).double().requires_grad_(False)
    m = sums(layer, torch.zeros(10, 2, dtype=torch.float64))
    nothing = Pattern(torch.zeros(2, 2).double(), torch.zeros(2, 2).double(), torch.ones(2, dtype=torch.bool))
    assert rho(Probe(m, 1e-6).direction(nothing), m, nothing).isnan().all()


def test_a_covariance_short_of_positive_definite_gets_a_larger_ridge():
    layer = nn.Linear(3, 1).double().requires_grad_(False)
    m = sums(layer, torch.randn(50, 3, dtype=torch.float64))
    m.gram[0] = m.n * (torch.outer(m.mean_x[0], m.mean_x[0]) + torch.diag(torch.tensor([-1e-4, 1.0, 1.0])))
    assert 1e-6 < Probe(m, 1e-6).regularisation <= 1e-2
    m.gram[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Probe(m, 1e-6)


@pytest.mark.parametrize("deviation", [1e-3, 1e-5, 1e-7, 0.0])
def test_a_channel_that_hardly_varies_beside_its_padding_has_a_covariance(deviation):
    """A 3×3 window on one pixel: eight of nine values are padding, far from the channel's mean."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4).requires_grad_(False)
    collector = Collector(layer, gram=True)
    for _ in range(4):
        x = torch.randn(64, 4, 1, 1).relu()
        x[:, 0] = 3 + deviation * torch.randn(64, 1, 1)
        collector.add(x, layer(x))
    m = collector.moments()
    assert Probe(m, 1e-4).regularisation == 1e-4
    assert float(m.cov_x[0].diagonal()[[0, 1, 2, 3, 5, 6, 7, 8]].abs().max()) < 1e-13


def test_moments_without_gram_have_no_rho():
    layer = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="without the Gram"):
        Probe(sums(layer, torch.randn(9, 2), gram=False), 1e-6)


@pytest.mark.parametrize("ridge", [-1.0, 1.01e4, 1e300, float("inf"), float("nan")])
def test_a_ridge_that_leaves_nothing_is_refused(ridge):
    layer = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"regularisation=.* is not possible: give a number from 0 to 10000"):
        Probe(sums(layer, torch.randn(20, 3).double()), ridge)


def test_beyond_the_largest_ridge_nothing_would_change():
    """From there on, v is cov[d, y] up to its length."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double().requires_grad_(False), torch.randn(200, 6).double()
    moments = sums(layer, x @ torch.randn(6, 6).double())
    pattern = Pattern(layer.weight / 2, layer.weight / 2, torch.zeros(4, dtype=torch.bool))
    value = rho(Probe(moments, 1e4).direction(pattern), moments, pattern)
    cov_dy = moments.cov_xu - pattern.positive * moments.var_u[:, None]
    torch.testing.assert_close(value, rho(cov_dy, moments, pattern), rtol=1e-3, atol=1e-3)
    assert (value < 0.99).any()
