"""Images whose signal is known are what they are said to be."""

import json

import pytest
import torch

import pattern_bench as pb
from pattern_bench.configuration.build import build
from pattern_bench.data.known_signal import SCENARIOS, draw
from pattern_bench.errors import UserError

SIDES = (8, 16, 19)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_images_are_signal_and_distractor(scenario, side):
    known = draw(scenario, side, 0.4, 1.5, 60, 0)
    assert known.images.shape == known.signal.shape == known.distractor.shape == (60, 1, side, side)
    assert torch.equal(known.images, known.signal + known.distractor)
    assert float(known.images.square().mean()) == pytest.approx(1, rel=1e-5)
    assert known.labels.bincount().tolist() == [30, 30]
    assert torch.equal(known.signal[:, 0] != 0, known.truth)
    assert not (known.truth & known.suppressor).any()
    assert known.truth.flatten(1).sum(1).tolist() == [int(known.suppressor.sum())] * 60


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_same_seed_gives_the_same_images(scenario):
    first, again, other = (draw(scenario, 8, 0.4, 1.0, 20, seed) for seed in (3, 3, 4))
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in vars(first))
    assert not torch.equal(first.images, other.images)


def test_the_settings_are_the_shares_of_the_sum():
    """Of what the classes do not share; the suppressor's distractor is as many times the signal as asked for."""
    plain, distracted = draw("linear", 8, 0.3, 0.0, 4000, 0), draw("linear", 8, 0.3, 2.0, 4000, 0)
    ratio = plain.signal.square().mean().sqrt() / plain.distractor.square().mean().sqrt()
    assert float(ratio) == pytest.approx(0.3 / 0.7, rel=1e-4)
    scale = distracted.signal.abs().max() / plain.signal.abs().max()
    added = distracted.distractor[:, 0] - scale * plain.distractor[:, 0]
    where = distracted.truth[0] | distracted.suppressor
    assert float(added[:, ~where].abs().max()) < 1e-5
    deviation = added[:, where].std(0) / distracted.signal.abs().max()
    assert deviation.tolist() == pytest.approx([2.0] * int(where.sum()), rel=0.05)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_distractor_tells_nothing_of_the_class(scenario):
    known = draw(scenario, 8, 0.4, 2.0, 20000, 0)
    s = 1.0 - 2 * known.labels
    part = known.images[:, 0][:, known.suppressor]
    for values in (part, part.square()):
        correlation = ((values - values.mean(0)) * s[:, None]).mean(0) / values.std(0)
        assert float(correlation.abs().max()) < 4 / 20000**0.5


def test_the_background_falls_with_frequency():
    known = draw("linear", 32, 0.01, 0.0, 2000, 0)
    rows = known.distractor[:, 0] - known.distractor[:, 0].mean((1, 2), keepdim=True)
    power = torch.fft.rfft(rows, dim=2).abs().square().mean((0, 1))
    assert float(power[2] / power[8]) > 5
    # Opposite edges are cut from different places.
    near, far = (rows[:, :, 0] * rows[:, :, 1]).mean(), (rows[:, :, 0] * rows[:, :, -1]).mean()
    assert far < 0.5 * near


@pytest.mark.parametrize("scenario", ["multiplicative", "translation"])
def test_no_linear_filter_tells_classes_apart_where_they_have_the_same_mean(scenario):
    known = draw(scenario, 8, 0.5, 0.0, 20000, 0)
    means = [known.images[known.labels == label].mean(0) for label in (0, 1)]
    difference, spread = (means[0] - means[1]).abs(), known.images.std(0)
    # Of a translated tetromino only its mean place depends on its shape.
    assert float((difference / spread).max()) < (0.05 if scenario == "multiplicative" else 0.3)


def test_the_best_filter_needs_the_suppressor_and_the_pattern_does_not():
    """Haufe et al.'s example: the filter has weight on class-free pixels, the pattern is the class pattern."""
    known = draw("linear", 8, 0.3, 2.0, 60000, 0)
    x, s = known.images.flatten(1).double(), 1.0 - 2 * known.labels.double()
    x = x - x.mean(0)
    covariance = x.mT @ x / len(x)
    direction = (x * s[:, None]).mean(0)
    w = torch.linalg.solve(covariance, direction)
    pattern = covariance @ w
    true = known.signal[known.labels == 0][0].flatten().double()
    assert float(torch.cosine_similarity(pattern, true, dim=0)) > 0.999
    suppressor = known.suppressor.flatten()
    assert float(w[suppressor].abs().sum() / w.abs().sum()) > 0.15
    assert float(pattern[suppressor].abs().sum() / pattern.abs().sum()) < 0.02
    assert float(torch.cosine_similarity(w, true, dim=0)) < 0.8


def test_s_a_of_a_trained_linear_model_is_the_class_pattern():
    known = draw("linear", 8, 0.3, 2.0, 20000, 0)
    x, s = known.images.flatten(1).double(), 1.0 - 2 * known.labels.double()
    w = torch.linalg.lstsq(x, s[:, None]).solution
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2, bias=False))
    network[1].weight.data = torch.cat([w, -w], 1).mT.float()
    network.eval()
    moments = pb.collect_moments(network, known.images.split(1000), gram=False)
    found = pb.fit_patterns(network, moments, "a")["1"].positive[0].double()
    true = known.signal[known.labels == 0][0].flatten().double()
    assert float(torch.cosine_similarity(found, true, dim=0)) > 0.99


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.scenario=linar", r"data.scenario=linar is unknown: did you mean linear"),
        ("data.side=7", r"data.side=7 is not possible: give a whole number of at least 8"),
        ("data.signal=1.0", r"data.signal=1.0 is not possible: give the signal's share"),
        ("data.suppressor=-1", r"data.suppressor=-1 is not possible: give a number of at least 0"),
        ("data.suppressor=true", r"data.suppressor=True is not possible: give a number of at least 0"),
        ("data.samples=1", r"data.samples=1 is not possible: give a whole number of at least 2"),
    ],
)
def test_impossible_settings_are_refused(configure, override, message):
    with pytest.raises(UserError, match=message):
        build(configure("data=known_signal", override).data)


@pytest.mark.parametrize("value", ["abc", "null", "1.5", "-1", "true"])
@pytest.mark.parametrize("data", ["known_signal", "toy"])
def test_the_seed_of_the_draws_is_a_whole_number(run_job, data, value):
    with pytest.raises(UserError, match=r"data.data_seed=\S+ is not possible: give a whole number of at least 0"):
        run_job(f"data={data}", f"data.data_seed={value}", "model=linear")


@pytest.mark.slow
def test_the_job_measures_the_angle_to_the_known_signal(run_job):
    folder = run_job("data=known_signal", "model=linear", "estimator=a", "explanation.images=2")
    angles = json.loads((folder / "summary.json").read_text())["signal_angle_degrees"]
    assert angles["pattern"] < 15 < 40 < angles["filter"]


def test_the_default_network_is_trained_on_it(run_job):
    folder = run_job("data=known_signal", "data.samples=600", "model.training.epochs=2", "explanation.images=2")
    assert json.loads((folder / "accuracy.json").read_text())["images"] == 120
