import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from pattern_bench.engine.explanation_streams import DegradationStream
from pattern_bench.metrics.degradation import (
    ORDERS,
    REPLACEMENTS,
    area_over_curve,
    degradation_curve,
    degraded,
    mean_interval,
    patch_order,
    random_patch_order,
    replacement,
)


def test_a_case_computed_by_hand():
    """A 5×4 image with 2×2 patches: the last row belongs to no whole patch and stays."""
    image = torch.arange(20.0).view(1, 1, 5, 4)
    heat = torch.zeros(1, 1, 5, 4)
    heat[0, 0, 2, 2] = 3.0  # lower right patch first
    heat[0, 0, 0, 0], heat[0, 0, 1, 1] = 5.0, -4.0  # upper left next: 5 - 4 = 1
    heat[0, 0, 0, 2] = -1.0  # upper right last
    heat[0, 0, 4, :] = 100.0  # outside every patch
    ranks = patch_order(heat, 2)
    assert ranks.tolist() == [[[1, 3], [2, 0]]]
    images = [step.clone()[0, 0] for step in degraded(image, ranks, 2, 2)]
    assert torch.equal(images[0], image[0, 0])
    first = image[0, 0].clone()
    first[2:4, 2:4] = (10 + 11 + 14 + 15) / 4
    assert torch.equal(images[1], first)
    first[0:2, 0:2] = (0 + 1 + 4 + 5) / 4
    assert torch.equal(images[2], first)

    def network(x):
        """Logits (sum of the lower right patch's first pixel, 0)."""
        return torch.stack([x[:, 0, 2, 2], torch.zeros(len(x))], 1) / 10

    curve = degradation_curve(network, image, ranks, torch.tensor([0]), 2, 2)
    expected = torch.tensor([[10.0, 12.5, 12.5]]).div(10).sigmoid()
    torch.testing.assert_close(curve, expected)
    torch.testing.assert_close(area_over_curve(curve), (expected[:, 0] - expected.mean(1)))


def test_patches_are_replaced_by_their_mean_per_channel_and_the_input_is_kept():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    before = images.clone()
    ranks = patch_order(torch.randn(2, 3, 6, 6), 3)
    *_, last = degraded(images, ranks, 3, 4)
    for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):
        mean = images[:, :, row : row + 3, column : column + 3].mean((2, 3), keepdim=True)
        torch.testing.assert_close(last[:, :, row : row + 3, column : column + 3], mean.expand(2, 3, 3, 3))
    assert torch.equal(images, before)


def test_random_ranks_are_permutations_that_follow_the_seed():
    first, again, other = (random_patch_order(3, (4, 5), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten(1).sort(1).values, torch.arange(20).expand(3, 20))


def perturbed_regions(network, image, heat, target, patch, steps, order, how):
    """Region perturbation (Samek et al. 2017) in numpy and scipy, one patch after the other."""
    image, heat = image.numpy().astype(np.float64), heat.numpy().astype(np.float64).sum(0)
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    regions = [(slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch))
               for r in range(rows) for c in range(columns)]  # fmt: skip
    regions.sort(key=lambda region: heat[region].sum(), reverse=order == "most")
    blurred = np.stack([gaussian_filter(channel, patch, mode="nearest", truncate=3) for channel in image])
    curve = []
    for step in range(steps + 1):
        if step:
            for channel in range(len(image)):
                where = (channel, *regions[step - 1])
                image[where] = {"mean": image[where].mean(), "blur": blurred[where], "constant": 0.7}[how]
        logits = network(torch.from_numpy(image)[None].float())[0].double().numpy()
        curve.append(softmax(logits)[target])
    return np.array(curve)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_curves_equal_an_independent_region_perturbation(order, how):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(32, 5),
    ).eval().requires_grad_(False)  # fmt: skip
    images, heat, target = torch.randn(4, 3, 23, 17), torch.randn(4, 3, 23, 17), torch.tensor([0, 1, 4, 2])
    ranks = patch_order(heat, 4, order)
    curves = degradation_curve(network, images, ranks, target, 4, 15, replacement(images, 4, how, 0.7))
    for i in range(4):
        expected = perturbed_regions(network, images[i], heat[i], int(target[i]), 4, 15, order, how)
        np.testing.assert_allclose(curves[i], expected, atol=2e-6)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_images():
    torch.manual_seed(0)
    values = torch.randn(4000).double() * 3 + 1
    low, high = mean_interval(values, torch.Generator().manual_seed(0))
    half = 1.96 * float(values.std()) / 4000**0.5
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)


def test_the_random_order_is_taken_once_for_all_methods(run_job, tmp_path, monkeypatch):
    taken = []
    visit = DegradationStream.visit

    def watched(self, *batch):
        taken.append(self.baseline)
        visit(self, *batch)

    monkeypatch.setattr(DegradationStream, "visit", watched)
    settings = ["data.limit=200", "model.training.epochs=1", "explanation.images=1", "estimator=x"]
    settings += [f"cache.dir={tmp_path / 'cache'}", "degradation.images=6"]
    tables = []
    for changed in (["method=gradient"], ["method=deconvnet"], ["method=gradient", "degradation.order=least"],
                    ["method=gradient", "degradation.replacement=blur"], ["method=gradient", "seed=1"]):  # fmt: skip
        folder = run_job(*settings, *changed)
        tables.append(pd.read_csv(folder / "degradation.csv").query("method.str.startswith('random_order')"))
    assert taken == [False, True, False, False, False, True, False, True]
    for other in tables[1:3]:
        pd.testing.assert_frame_equal(tables[0], other)
    assert not tables[0].probability_mean.equals(tables[3].probability_mean)
    assert not tables[0].probability_mean.equals(tables[4].probability_mean)
