"""Measures of likeness, against scipy and by brute force."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from pattern_bench.metrics.similarity import convergence, cosine, rank_data, similarities, spearman, ssim
from pattern_bench.pipeline.sanity_rows import MEASURES


def test_spearman_is_scipys_also_with_ties():
    torch.manual_seed(0)
    a, b = torch.randn(4, 50), torch.randn(4, 50)
    a[1], b[1] = a[1].round(), b[1].round()
    b[2] = a[2].exp()
    for i, value in enumerate(spearman(a, b)):
        assert float(value) == pytest.approx(spearmanr(a[i].numpy(), b[i].numpy()).statistic, abs=1e-12)
    assert rank_data(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1.0, 3.5, 2.0]]
    assert spearman(torch.ones(1, 5), torch.randn(1, 5)).isnan().all()


@pytest.mark.parametrize("shape", [(12, 9), (8, 8), (5, 6), (3, 3)])
def test_ssim_is_its_definition_window_by_window(shape):
    torch.manual_seed(0)
    a, b = torch.randn(1, *shape).double(), torch.randn(1, *shape).double()
    side = min(7, *shape)
    side -= 1 - side % 2
    x, y = (m[0].numpy() / (2 * m.abs().max().item()) + 0.5 for m in (a, b))
    found = []
    for i in range(shape[0] - side + 1):
        for j in range(shape[1] - side + 1):
            p, q = x[i : i + side, j : j + side].ravel(), y[i : i + side, j : j + side].ravel()
            (vp, c), (_, vq) = np.cov(p, q)
            c1, c2 = 0.01**2, 0.03**2
            found.append(
                (2 * p.mean() * q.mean() + c1) * (2 * c + c2)
                / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (vp + vq + c2))
            )  # fmt: skip
    assert float(ssim(a, b)) == pytest.approx(np.mean(found), abs=1e-12)


def test_measures_do_not_depend_on_scale_and_hold_for_huge_values():
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, 8).double(), torch.randn(3, 8, 8).double()
    here, there = similarities(a, b), similarities(a * 1e200, b * 1e-200)
    for name in MEASURES:
        assert torch.allclose(here[name], there[name])
        assert torch.allclose(similarities(a, a)[name], torch.ones(3).double())
    assert torch.allclose(here["cosine"], nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    assert similarities(a, -a)["spearman_absolute"].allclose(torch.ones(3).double())
    one_signed = similarities(a.abs(), -a.abs())
    assert (one_signed["ssim"] < 0).all()
    assert one_signed["cosine"].allclose(-torch.ones(3).double())
    assert all(values.isnan().all() for values in similarities(a, torch.zeros_like(a)).values())
    assert cosine(a.flatten(1), -a.flatten(1)).allclose(-torch.ones(3).double())


def test_convergence_leaves_out_what_has_no_direction():
    line = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.0, 0.0], [torch.inf, 1.0]])
    assert float(convergence(line)) == pytest.approx(1)
    assert float(convergence(torch.eye(3))) == 0
    assert convergence(line[2:]).isnan()
