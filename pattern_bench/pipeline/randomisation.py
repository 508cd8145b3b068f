"""Cascading randomisation (Adebayo et al. 2018): does an explanation depend on what the layers have learned?

Layers get new random weights one after the other, from the output down, and the heat map of the class first predicted
is compared with that of the trained network. A method whose heat map stays does not depend on what those layers
learned. A low similarity alone does not make a method faithful: noise scores best.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.layers import Scratch
from pattern_bench.core.network import collecting
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import fast_layout
from pattern_bench.errors import UserError
from pattern_bench.metrics.similarity import similarities
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import Explainer
from pattern_bench.pipeline.patterns import fit_patterns
from pattern_bench.pipeline.sanity_rows import MEASURES, SanityRows, make_explainer, named, row
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Stage


def randomisation(
    setup: Setup,
    machine: Machine,
    methods: Mapping[str, Any],
    explainer: Explainer,
    images: Tensor,
    refit: Tensor | None,
    bar: Bar,
) -> SanityRows:
    """Randomise layer after layer, from the output down, and compare explanations with the trained network's.

    A row per method, layer and measure: how alike the heat maps of the trained network and of its copy are, whose
    layers from the output down to that one are random. Heat maps are explanations summed over channels. Methods that
    start from the output's value turn their sign with it, and signed measures see that.

    A pattern is made for its weights (wᵀa = 1) and for what reaches its layer. So with ``refit`` images (F, C, H, W)
    the patterns of the randomised layers, and only theirs, are fitted again: nothing below them has changed. With None
    the trained network's patterns stay. Learned parameters outside of Conv and Linear layers stay too.
    """
    target = _predicted(setup.model, images, setup.source.batch_size)
    bar.start(len(methods) * (len(setup.all_layers) + 1), "trained network")
    originals: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, method in methods.items():
        try:
            originals[name] = explainer.explain(method, images, target).sum(1)
        except UserError as error:
            left_out[f"{name}, randomisation"] = str(error)
        bar.advance()
    model, patterns = copy.deepcopy(setup.model), dict(explainer.patterns)
    rows: list[dict[str, Any]] = []
    for index in reversed(range(len(setup.all_layers))):
        layer = setup.all_layers[index]
        randomise(model.get_submodule(layer), setup.seed(f"randomised {layer}"))
        if refit is not None:
            patterns |= _refitted(setup, machine.device, model, setup.all_layers[index:], refit)
        randomised = Explainer(model, patterns, explainer.reference, explainer.batch_size)
        for name, original in originals.items():
            bar.advance(detail=f"{layer}, {name}")
            try:
                found = similarities(original, randomised.explain(methods[name], images, target).sum(1))
            except UserError as error:
                left_out[f"{name}, randomised down to {layer}"] = str(error)
                found = {measure: torch.full((1,), torch.nan) for measure in MEASURES}
            rows += [row(name, "randomisation", layer, index, m, values) for m, values in found.items()]
    return SanityRows(rows=rows, left_out=named(left_out))


def randomise(layer: nn.Module, seed: int) -> None:
    """Gives a layer the weights that PyTorch would begin its training with: ``reset_parameters`` with ``seed``."""
    fresh: Any = copy.deepcopy(layer).cpu()  # the same numbers whatever the device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh.reset_parameters()
    layer.load_state_dict(fresh.state_dict())


def _predicted(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(fast_layout(part)).argmax(1) for part in images.split(batch_size)])


def _refitted(
    setup: Setup, device: torch.device, model: nn.Module, layers: list[str], images: Tensor
) -> dict[str, Pattern]:
    """Patterns of the named layers of ``model``, on ``images``."""
    scratch = Scratch()
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    positions = setup.cfg.moments.positions
    collectors = {
        name: Collector(module, False, setup.memory, positions, setup.seed(name), scratch)
        for name, module in modules.items()
    }
    with torch.no_grad(), collecting(model, collectors):
        for part in images.split(setup.source.batch_size):
            model(fast_layout(part.to(device)))
    moments = {name: collector.moments().to("cpu") for name, collector in collectors.items()}
    return fit_patterns(replace(setup, model=model), moments)


class Randomisation(SanityRows):
    """Rows of ``sanity.csv`` of the check ``randomisation``."""


@dataclass(frozen=True)
class RandomiseLayers(Stage[Randomisation]):
    """Compare explanations with those of networks whose upper layers are random."""

    setup: Setup
    machine: Machine
    methods: Mapping[str, Any]
    images: Tensor
    refit: Tensor | None
    name = "randomisation"
    title = "cascading randomisation"

    def run(self, done: Done, bar: Bar) -> Randomisation:
        images = self.images.to(self.machine.device)
        explainer = make_explainer(self.setup, self.machine, self.methods, done)
        found = randomisation(self.setup, self.machine, self.methods, explainer, images, self.refit, bar)
        return Randomisation(rows=found.rows, left_out=found.left_out)
