"""Signals and volumes are drawn."""

import pytest
from helpers.endings import images
from torch import nn

import pattern_bench as pb


@pytest.mark.parametrize("shape", [(22, 64), (1, 8, 8, 8)])
def test_signals_and_volumes_are_drawn(shape, tmp_path):
    convolution, pool = {2: (nn.Conv1d, nn.AdaptiveAvgPool1d), 4: (nn.Conv3d, nn.AdaptiveAvgPool3d)}[len(shape)]
    model = nn.Sequential(convolution(shape[0], 4, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = images(2, *shape)
    methods = {"heat": lambda m, i, t: i, "signal": lambda m, i, t: -i}
    pb.draw_gallery(model, x, methods, tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 5000
