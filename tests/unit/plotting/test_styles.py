"""Colours and dashes: told apart from the background, from each other, and by those who see fewer colours."""

from itertools import product

import numpy as np
import pytest

from pattern_bench.plotting.styles import contrast, curve_styles, estimator_colours, legible
from pattern_bench.reporting.page import COLOURS, DARK, LIGHT


def test_marks_stand_out_from_both_backgrounds():
    for colour in COLOURS:
        for background in (LIGHT, DARK):
            assert contrast(legible(colour, background), background) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert legible("#0173b2") == "#0173b2"


def test_estimators_differ_for_colour_blind_readers():
    """In CIELAB, after Machado, Oliveira and Fernandes (2009), whose matrices for full deficiency these are."""
    blind = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
        "nobody": np.eye(3).tolist(),
    }  # fmt: skip
    colours = estimator_colours([])
    del colours["none"]
    assert list(colours) == ["random", "x", "w", "a", "a_plus_minus"]
    for background, matrix in product((LIGHT, DARK), blind.values()):
        seen = [_lab(np.array(matrix) @ _linear(legible(colour, background))) for colour in colours.values()]
        distances = [np.linalg.norm(one - other) for i, one in enumerate(seen) for other in seen[:i]]
        assert min(distances) > 10


def _linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089]), 1e-6, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_no_two_curves_of_a_figure_look_alike():
    methods = ["gradient", "deconvnet", "guided_backprop", "lrp_z", "dtd_w2", "integrated_gradients", "smoothgrad",
               "occlusion", "prediction_difference", "random_order"]  # fmt: skip
    curves = [(e, m) for e in ("random", "w", "a", "a_plus_minus") for m in ("pattern_net", "pattern_attribution")]
    styles = curve_styles([*curves, ("x", "lrp_z"), *(("none", method) for method in methods)])
    assert len({(style.colour, style.dashes) for style in styles.values()}) == len(styles) == 19
