"""What is timed: each row of the tables, as a function that works on a whole batch of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.passes import moment_pass
from pattern_bench.api import Pattern
from pattern_bench.core.layers import geometry_of, patches
from pattern_bench.engine.streams import fast_layout
from pattern_bench.methods.gradients import Gradient
from pattern_bench.methods.patterns import PatternAttribution
from pattern_bench.metrics.degradation import degraded, grid_of, random_patch_order

FORWARD, CHANNELS_LAST = "forward", "forward, channels last"
PATTERNS, EVERYTHING = "patterns of all estimators", "everything that exact rho needs"
ATTRIBUTION = "PatternAttribution"
POSITIONS = 0.1
"""The share of positions in the rows that sample them."""


def rows(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; every one works on the whole batch.

    Args:
        model: in canonical form, in evaluation mode.
        x: (B, C, H, W).
    """
    fast = fast_layout(x)
    add_for_patterns, collectors = moment_pass(model, fast, False)
    layers = list(collectors)
    ranks = random_patch_order(len(x), grid_of(x.shape[2:], 2), torch.Generator().manual_seed(0)).to(x.device)
    steps = degraded(x, ranks, 2, ranks[0].numel())
    gradient, attribution = Gradient(model), PatternAttribution(model, filters_as_patterns(model, layers))
    unfolded: dict[str, Callable[[], object]] = {}
    if all(getattr(model.get_submodule(name), "groups", 1) == 1 for name in layers):  # as `unfolding` takes them
        unfolded = {
            "patterns, unfolding": lambda: unfolding(model, layers, x, False),
            "everything for rho, unfolding": lambda: unfolding(model, layers, x, True),
        }
    return {
        FORWARD: lambda: model(x),
        CHANNELS_LAST: lambda: model(fast),
        PATTERNS: add_for_patterns,
        EVERYTHING: moment_pass(model, fast, True)[0],
        f"patterns, {POSITIONS:.0%} of positions": moment_pass(model, fast, False, positions=POSITIONS)[0],
        f"everything for rho, {POSITIONS:.0%} of positions": moment_pass(model, fast, True, positions=POSITIONS)[0],
        **unfolded,
        "forward and backward": lambda: gradient.attribute(x),
        ATTRIBUTION: lambda: attribution.attribute(x),
        "a degraded image": lambda: model(next(steps)),
    }


def filters_as_patterns(model: nn.Module, layers: list[str]) -> dict[str, Pattern]:
    """S_w's patterns of each layer: with patterns of other lengths relevance shrinks to numbers that processors are
    slow with."""
    filters = {}
    for name in layers:
        weight: Any = model.get_submodule(name).weight
        pattern = weight / weight.flatten(1).square().sum(1).view(-1, *[1] * (weight.ndim - 1))
        filters[name] = Pattern(pattern, pattern, torch.zeros(len(weight), dtype=torch.bool))
    return filters


def unfolding(model: nn.Module, layers: list[str], x: Tensor, gram: bool) -> None:
    """The same sums through unfolded patches, as one would write it first."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        source = inputs[0]
        p = patches(source, geometry_of(layer))[0]  # type: ignore[arg-type]
        t = y.movedim(1, -1).reshape(len(p), -1)
        gate = (t > 0).to(t.dtype)
        for m in (gate, t * gate, t - t * gate):
            m.T @ p
        if gram:
            p.T @ p

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in layers]
    model(x)
    for handle in handles:
        handle.remove()
