"""Gram matrices of any geometry equal brute force, in whole batches and in parts, within the memory that is allowed."""

import copy

import numpy as np
import pytest
import torch
from helpers.brute_force import brute_neuron, brute_patches, collected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pattern_bench.core.collector import Collector


def test_a_batch_in_parts_equals_one_product():
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    whole = collected(layer, x)
    torch.testing.assert_close(collected(layer, x, memory=1).gram, whole.gram)


@st.composite
def geometries(draw):
    """A Conv2d of any geometry with an input that it accepts."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = (draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (3, 2)])) for _ in range(2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", (0, 0), (1, 1), (0, 2), (3, 1)]))
    if padding == "same":
        stride = (1, 1)
    least = [d * (k - 1) + 4 for k, d in zip(kernel, dilation, strict=True)]
    size = [n + draw(st.integers(0, 6)) for n in least]
    bias = draw(st.booleans())
    layer = nn.Conv2d(
        channels, outputs, kernel, stride, padding, dilation, groups, bias=bias, padding_mode=mode, dtype=torch.float64
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    mean = draw(st.sampled_from([0.0, 0.5, 300.0]))
    return layer.requires_grad_(False), x + mean


@settings(max_examples=150, deadline=None, derandomize=True)
@given(geometries(), st.booleans(), st.sampled_from([0, 64]))
def test_drawn_geometries_equal_brute_force(drawn, gram, small_patch):
    """In float64 to 1e-12, with float32 products to 1e-5, with and without the autocorrelation."""
    layer, x = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pattern_bench.core.gram.SMALL_PATCH", small_patch)
        exact = collected(layer, *x.split(1), gram=gram)
        single = collected(copy.deepcopy(layer).float(), x.float(), gram=gram)
    patches = brute_patches(layer, x)
    expected = {"x": patches.sum(1), "n": np.array(float(patches.shape[1]))}
    if gram:
        expected["gram"] = patches.transpose(0, 2, 1) @ patches
    rows = [brute_neuron(layer, x, neuron) for neuron in range(layer.weight.shape[0])]
    expected["g"] = np.array([g.sum() for _, _, g in rows])
    expected["xg"] = np.array([g.astype(float) @ p for p, _, g in rows])
    expected["xug"] = np.array([(u * g) @ p for p, u, g in rows])
    expected["xun"] = np.array([(u * ~g) @ p for p, u, g in rows])
    # The two regimes' sums are differences of the whole where the Gram matrix is known: their scale is the whole's.
    scale = np.array([np.abs(u) @ np.abs(p) for p, u, _ in rows])
    # A float32 gate may differ where y is zero to its last digit; no such y is in these draws' scale.
    for name, value in expected.items():
        norm = np.linalg.norm(scale if name in ("xug", "xun") else value)
        assert np.linalg.norm(getattr(exact, name).numpy() - value) <= 1e-12 * norm, name
        assert np.linalg.norm(getattr(single, name).numpy() - value) <= 1e-5 * norm, name


def test_the_bound_on_temporaries_holds():
    """Unfolding in parts: the largest allocation stays below the bound, which the whole batch would exceed."""
    layer = nn.Conv2d(8, 8, 3, stride=2).requires_grad_(False)
    x = torch.randn(16, 8, 65, 65)
    y, bound = layer(x), 2 * 2**20
    assert bound < 32 * 32 * 16 * 72 * 4
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Collector(layer, True, bound).add(x, y)
    assert max(event.cpu_memory_usage for event in profile.events()) <= bound
