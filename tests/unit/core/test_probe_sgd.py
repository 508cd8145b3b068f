"""The SGD probe's arithmetic, against samples taken one by one."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.brute_force import FITTED, brute_neuron, brute_rho, sums
from torch import nn

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.probe_closed_form import CRITERIA
from pattern_bench.core.probe_sgd import Correlation, Reader


def brute_samples(layer, x, pattern, neuron, criterion):
    """d, t of the samples that count, one after the other."""
    patch, u, gate = brute_neuron(layer, x, neuron)
    positive, negative = pattern.positive[neuron].numpy(), pattern.negative[neuron].numpy()
    d = patch - np.where(gate[:, None], positive, negative) * u[:, None]
    y = u if layer.bias is None else u + float(layer.bias[neuron])
    t = {"all": u, "rectified": np.maximum(y, 0), "positive": u}[criterion]
    return (d[gate], t[gate]) if criterion == "positive" else (d, t)


def reader_for(layer, x, criterion, estimator="a_plus_minus"):
    fit = sums(layer, x)
    pattern = FITTED[estimator]().fit(layer.weight.flatten(1), fit, torch.Generator().manual_seed(0))
    other = x.flip(0) + 0.3 * torch.randn_like(x)
    reader = Reader(layer, pattern, criterion, 1e-3)
    reader.calibrate(other, layer(other))
    return reader, pattern, other


@pytest.mark.parametrize("criterion", CRITERIA)
def test_objective_and_correlation_equal_brute_force(layer_and_input, criterion):
    layer, x = layer_and_input
    torch.manual_seed(2)
    reader, pattern, other = reader_for(layer, x, criterion)
    with torch.no_grad():
        reader.coordinates.normal_()
        reader.offset.normal_()
        loss = reader.loss(other, layer(other))
    correlation = Correlation(reader)
    for part in other.split(2):
        correlation.add(part, layer(part))
    values, v = correlation.rho(), reader.v.detach().numpy()
    for neuron in range(len(v)):
        d, t = brute_samples(layer, other, pattern, neuron, criterion)
        if len(t) < 2 or t.std() == 0:
            assert values[neuron].isnan()
            continue
        read, unit = d @ v[neuron], t.std()
        error = (t - t.mean()) - (read - read.mean()) - reader.offset[neuron].item() * unit
        expected = ((error**2).mean() + float(reader.ridge[neuron]) * (v[neuron] ** 2).sum()) / unit**2
        assert float(loss[neuron]) == pytest.approx(expected, rel=1e-8)
        assert float(values[neuron]) == pytest.approx(1 - np.corrcoef(read, t)[0, 1], abs=1e-8)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_least_objective_is_at_the_best_reader(criterion):
    """Minimised to the end, the objective gives brute force's ridge regression, also on the positive samples alone."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64).relu() + 0.1
    reader, pattern, other = reader_for(layer, x, criterion)
    y = layer(other)
    optimiser = torch.optim.LBFGS(
        reader.parameters(),
        max_iter=500,
        history_size=50,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        total = reader.loss(other, y).sum()
        total.backward()
        return total

    optimiser.step(closure)
    for neuron in range(4):
        d, t = brute_samples(layer, other, pattern, neuron, criterion)
        d, t = d - d.mean(0), t - t.mean()
        ridge = float(reader.ridge[neuron]) * np.eye(d.shape[1])
        expected = np.linalg.solve(d.T @ d / len(d) + ridge, d.T @ t / len(t))
        np.testing.assert_allclose(reader.v[neuron].detach(), expected, atol=1e-3 * np.abs(expected).max())
    if criterion != "positive":
        correlation = Correlation(reader)
        correlation.add(x, layer(x))
        values = correlation.rho()
        for neuron in range(4):
            expected = brute_rho(layer, other, x, pattern, neuron, float(reader.ridge[neuron]), criterion)
            assert float(values[neuron]) == pytest.approx(expected, abs=1e-4)


def test_coordinates_are_decorrelated():
    """Inputs that are mixtures over channels come out with unit covariance: descent sees a round bowl."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 2, 1).double().requires_grad_(False)
    x = torch.einsum("dc,bchw->bdhw", torch.randn(4, 4).double(), torch.randn(8, 4, 20, 20).double())
    reader, _, other = reader_for(layer, x, "all")
    z = torch.einsum("cd,bchw->dbhw", reader.across_channels[0], other).flatten(1) * reader.across_taps[0, 0, 0]
    torch.testing.assert_close(torch.cov(z), torch.eye(4).double(), rtol=0, atol=0.1)


def test_more_channels_than_can_be_decorrelated_are_scaled(monkeypatch):
    monkeypatch.setattr("pattern_bench.core.probe_sgd.WIDEST", 3)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double().requires_grad_(False)
    x = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1.0, 10, 100, 0, 5])
    reader, _, other = reader_for(layer, x, "all")
    assert reader.across_channels.shape == (1, 5)
    with torch.no_grad():
        reader.coordinates.fill_(1)
        assert torch.isfinite(reader.loss(other, layer(other))).all()
    spread = (reader.across_channels[0] * x.std(0))[torch.tensor([1, 2, 4])]
    assert spread.max() / spread.min() < 1.5


def test_neurons_and_inputs_without_variance_stay_finite():
    """A neuron that never fires, and inputs that are always 0, under every criterion."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2).double().requires_grad_(False)
    layer.bias.copy_(torch.tensor([-100.0, 0.0]))
    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 1] = 0
    for criterion in CRITERIA:
        reader, _, other = reader_for(layer, x, criterion)
        loss = reader.loss(other, layer(other)).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(reader.coordinates.grad).all()
        correlation = Correlation(reader)
        correlation.add(x, layer(x))
        assert bool(correlation.rho()[0].isnan()) == (criterion != "all")
        assert not correlation.rho()[1].isnan()


def test_a_pattern_in_the_weights_shape_is_the_same():
    layer = nn.Conv2d(2, 3, 3).double().requires_grad_(False)
    a = torch.randn(3, 18).double()
    dead = torch.zeros(3, dtype=torch.bool)
    flat, shaped = (Reader(layer, Pattern(p, p, dead), "all", 1e-4) for p in (a, a.view(3, 2, 3, 3)))
    assert torch.equal(flat.positive, shaped.positive)


SGD = ["probe=both", "explanation.images=1", "degradation.images=2"]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["random", "w", "a_plus_minus"])
def test_descent_and_closed_form_agree_on_the_digits(run_job, estimator):
    """Within 0.02 for 95 % of live neurons: what the suite promises of every network."""
    folder = run_job(*SGD, f"estimator={estimator}", "probe.steps=300")
    summary = json.loads((folder / "summary.json").read_text())
    apart = summary["probe_difference"]
    assert apart["all"]["share_within_0.02"] >= 0.95
    rho = pd.read_csv(folder / "rho.csv")
    wide = rho.pivot(index=["layer", "neuron"], columns="probe", values="rho").dropna()
    assert (wide.sgd != wide.closed_form).any()
    assert apart["all"]["largest_absolute"] == pytest.approx((wide.sgd - wide.closed_form).abs().max())
    assert summary["rho"]["all"]["mean"] == pytest.approx(wide.closed_form.mean())
    assert summary["descent"]["steps"] <= 300
    assert list((folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
def test_descent_alone_serves_the_positive_criterion_and_stops_early(run_job):
    folder = run_job(
        "probe=sgd", "criterion=positive", "estimator=a", "data.limit=400", "layer=features.0", "probe.steps=5000",
        "probe.patience=3", "model.training.epochs=4",
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["descent"]["stopped_early"]
    assert summary["descent"]["steps"] < 5000
    rho = pd.read_csv(folder / "rho.csv")
    assert set(rho.probe) == {"sgd"}
    assert set(rho.criterion) == {"positive"}
    # Within the positive regime the linear estimator leaves what S_a+- would find.
    assert rho.rho.mean() < 0.9
    assert "regularisation" not in summary


@pytest.mark.slow
def test_where_neurons_fire_the_closed_form_agrees_with_descent(run_job):
    folder = run_job(
        "probe=both", "criterion=positive", "estimator=w", "data.limit=900", "layer=[features.0,features.2]",
        "probe.steps=3000", "probe.neurons=12", "model.training.epochs=4", "data.batch_size=64",
    )  # fmt: skip
    rho = pd.read_csv(folder / "rho.csv")
    assert rho[rho.probe == "closed_form"].groupby("layer").size().to_dict() == {"features.0": 12, "features.2": 12}
    assert rho[rho.probe == "sgd"].groupby("layer").size().to_dict() == {"features.0": 16, "features.2": 16}
    wide = rho.pivot(index=["layer", "neuron"], columns="probe", values="rho").dropna()
    assert len(wide) >= 16
    assert ((wide.sgd - wide.closed_form).abs() < 0.02).mean() > 0.9


@pytest.mark.slow
def test_where_neurons_fire_rho_has_standard_errors_and_its_moments_are_cached(run_job):
    settings = ["criterion=positive", "estimator=a", "bootstrap.resamples=4", "bootstrap.chunks=3", "probe.neurons=5"]
    first, second = (run_job(*settings, "layer=features.2") for _ in range(2))
    summary = json.loads((first / "summary.json").read_text())
    (layer,) = summary["rho"]["layers"]
    assert layer["neurons"] == 5
    assert 0 < layer["standard_error"]["mean"] < 0.5
    assert (first / "rho.csv").read_text() == (second / "rho.csv").read_text()
    assert (first / "bootstrap.csv").read_text() == (second / "bootstrap.csv").read_text()


@pytest.mark.very_slow
@pytest.mark.parametrize("estimator", ["w", "a_plus_minus"])
def test_descent_and_closed_form_agree_on_a_squeezenet_layer(run_job, estimator):
    """On photographs: minutes. PATTERN_BENCH_PHOTOGRAPHS is a folder of them, PATTERN_BENCH_SQUEEZENET the weights."""
    photographs, weights = (os.environ.get(f"PATTERN_BENCH_{name}", "") for name in ("PHOTOGRAPHS", "SQUEEZENET"))
    if not Path(photographs).is_dir() or not Path(weights).is_file():
        pytest.skip("needs PATTERN_BENCH_PHOTOGRAPHS (a folder) and PATTERN_BENCH_SQUEEZENET (safetensors)")
    folder = run_job(
        "probe=both", "data=folder", f"data.root={photographs}", "model=squeezenet1_1", f"model.weights={weights}",
        "layer=features.3.expand3x3", f"estimator={estimator}",
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["probe_difference"]["all"]["share_within_0.02"] >= 0.95
