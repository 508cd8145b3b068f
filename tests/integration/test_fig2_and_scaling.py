"""Two of the experiments, small: what they write, and what they know in closed form."""

import pandas as pd
import pytest
import torch
from helpers.paths import ROOT
from torch import nn

pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="experiments/ is not here")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_every_method_but_two_is_wrong_by_the_angle_that_theory_says(command, tmp_path):
    done = command("--quick", "--runs", tmp_path, module="experiments.fig2_linear", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    angles = pd.read_csv(tmp_path / "fig2_linear" / "angles.csv")
    exact = angles[angles.fit == "exact"].set_index(["method", "phi"])["mean"]
    for phi in (15, 45, 75, 90, 135):
        for method in ("PatternNet, S_a", "PatternNet, S_a+-", "PatternAttribution, S_a", "PatternAttribution, S_a+-"):
            assert exact[method, phi] == 0
        for method in ("gradient", "DeConvNet", "Guided BackProp", "SmoothGrad", "PatternNet, S_w"):
            assert exact[method, phi] == pytest.approx(abs(90 - phi), abs=1e-4)
        assert exact["Integrated Gradients", phi] == pytest.approx(exact["LRP z-rule, input × gradient", phi], abs=1e-3)
    assert exact["S_x, the input", 45] > 10
    assert (tmp_path / "fig2_linear" / "fig2.png").stat().st_size > 10_000


@pytest.mark.slow
def test_scaling_measures_and_draws_without_any_files(command, tmp_path):
    done = command("--quick", "--runs", tmp_path, module="experiments.scaling", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    tables = {file.stem: pd.read_csv(file) for file in (tmp_path / "scaling").glob("*.csv")}
    patterns = tables["patterns"].query("layer == 'features.0' and pattern == 'a'").groupby("n").disjoint.mean()
    assert patterns[50] < patterns[10]
    assert (tables["cost_width"].query("what == 'rho'").seconds > 0).all()
    gpus = tables["gpus"]
    assert (gpus.groupby("network").seconds.diff().dropna() < 0).all()
    assert (gpus.speedup <= gpus.gpus + 1e-6).all()
    assert {"error.png", "cost.png"} <= {file.name for file in (tmp_path / "scaling").iterdir()}


def test_operations_on_paper_are_those_that_torch_counts():
    from experiments.scaling.cost import EVERYTHING, FORWARD, PATTERNS, counted, steady
    from experiments.scaling.projection import size

    network = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.Conv2d(32, 32, 3, stride=2),
        nn.Flatten(), nn.Linear(32 * 15 * 15, 10),
    ).eval().requires_grad_(False)  # fmt: skip
    x, found = torch.randn(1, 16, 32, 32), []
    for module in network:
        y = module(x)
        if hasattr(module, "weight"):
            found.append(size(module, x, y))
        x = y
    images = 65  # a dense layer has one sample of each, and so few that it is summed in float64 otherwise
    counts = {w: counted(thing) / images for w, thing in steady(network, torch.randn(images, 16, 32, 32)).items()}
    forward = sum(one.forward for one in found)
    assert counts[FORWARD] == forward
    assert counts[PATTERNS] == forward + sum(one.patterns for one in found)
    # The border of the autocorrelation is left out on paper.
    assert counts[EVERYTHING] == pytest.approx(forward + sum(one.everything for one in found), rel=0.05)


def test_moments_of_chunks_are_those_of_all_images():
    from experiments.scaling.errors import collected, pattern_errors, total

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval().double()
    images = [torch.rand(10, 1, 8, 8, dtype=torch.float64) for _ in range(6)]
    chunks = collected(network, images, gram=False)
    (whole,) = collected(network, [torch.cat(images)], gram=False)
    for layer, sums in total(chunks).items():
        for name, tensor in sums.tensors().items():
            torch.testing.assert_close(tensor, whole[layer].tensors()[name], rtol=1e-9, atol=1e-9)
    found = pattern_errors(network, chunks, (10, 30), draws=2)
    assert set(found.n) == {10, 30}
    # The full fit is half made of the thirty images, and two thirds are not of the ten.
    mean = found.groupby("n").full.mean()
    assert 0 < mean[30] < mean[10]
