"""Patterns: what the estimator makes of the statistics of the first half of the training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pattern_bench.core import responses, weight_digests
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.moments import Moments
from pattern_bench.engine.progress import Bar
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.moments import SplitMoments, all_samples, collect, statistics_uses
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives
from pattern_bench.results.schema import pattern_tensors


def fit_pattern(setup: Setup, layer: str, moments: Moments) -> Pattern:
    """A layer's patterns, (N, D) float64."""
    generator = torch.Generator().manual_seed(setup.seed(layer))
    return setup.estimator.fit(setup.weight(layer), moments, generator)


def fit_patterns(setup: Setup, moments: Mapping[str, Moments]) -> dict[str, Pattern]:
    """Patterns of every selected layer, (N, D) float64, in every process."""
    patterns = {}
    for layer in moments:
        weight = setup.weight(layer)
        dead = torch.zeros(len(weight), dtype=torch.uint8)
        parts = [weight.clone(), weight.clone(), dead]
        if collectives.is_rank_zero():
            fitted = fit_pattern(setup, layer, moments[layer])
            parts = [fitted.positive, fitted.negative, fitted.dead.to(torch.uint8)]
        positive, negative, dead = (collectives.broadcast(part) for part in parts)
        patterns[layer] = Pattern(positive, negative, dead.bool())
    return patterns


def in_weight_shape(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns as they are used and saved: shaped and typed as the weights."""
    weights: dict[str, Any] = {layer: setup.model.get_submodule(layer).weight for layer in patterns}
    return {layer: pattern.shaped_like(weights[layer]) for layer, pattern in patterns.items()}


def signal_angles(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, float] | None:
    """Degrees between the known signal and the first layer's filter and pattern, where the data know their signal."""
    truth, layer = setup.source.signal, setup.layers[0]
    if truth is None or setup.weight(layer).shape[1] != len(truth):
        return None

    def degrees(direction: Tensor) -> float:
        cosine = (direction @ truth).abs() / (direction.norm() * truth.norm())
        return math.degrees(math.acos(min(1.0, float(cosine))))

    angles = {"filter": degrees(setup.weight(layer)[0])}
    if layer in patterns:
        angles["pattern"] = degrees(patterns[layer].positive[0])
    return angles


# --- the stage ---


@dataclass(frozen=True, kw_only=True)
class FittedPatterns(Result):
    """Patterns of the selected layers by the run's estimator; none of an estimator without.

    Attributes:
        moments: that they were fitted on.
        patterns: by layer, (N, D) float64.
        shaped: by layer, shaped and typed as the weights.
        uses: what the cache knows the moments by.
    """

    moments: SplitMoments[Moments] | None = None
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    shaped: Mapping[str, Pattern] = field(default_factory=dict)
    uses: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FitPatterns(Stage[FittedPatterns]):
    """Fit patterns on the first half of the training images."""

    setup: Setup
    machine: Machine
    name = "fit_patterns"
    title = "fit patterns on the first half"

    def why_skipped(self) -> str | None:
        return None if self.setup.estimator.has_pattern else self.setup.estimator.no_pattern_reason

    def without(self, reason: str) -> FittedPatterns:
        return FittedPatterns(skipped=reason)

    def run(self, done: Done, bar: Bar) -> FittedPatterns:
        sums = all_samples(self.setup, gram=False)
        moments, visited = collect(self.setup, self.machine, "fit", sums, bar)
        patterns = fit_patterns(self.setup, moments)
        return FittedPatterns(
            moments=moments, patterns=patterns, shaped=in_weight_shape(self.setup, patterns), visited=visited,
            uses=statistics_uses(self.setup, "fit", sums),
        )  # fmt: skip

    def write(self, result: FittedPatterns, run_folder: RunFolder) -> None:
        setup, estimator = self.setup, self.setup.estimator
        about = {**setup.names, "estimator": estimator.name}
        if result.skipped is not None:
            run_folder.tensors("patterns.safetensors", {}, {**about, "reason": result.skipped})
            return
        run_folder.uses("moments", f"{setup.model_name}-{setup.source.name}-fit", result.uses)
        fit = setup.splits["fit"]
        run_folder.tensors(
            "patterns.safetensors",
            pattern_tensors(result.shaped),
            {**about, "split": "fit", "images": str(len(fit)), "seed": str(setup.cfg.seed),
             "model_fingerprint": setup.model_key, **weight_digests.metadata(setup.belongs_to),
             **responses.metadata(setup.responses)},
        )  # fmt: skip
        fitted = {"estimator": estimator.name, "model": setup.model_key, "images": fit.fingerprint}
        run_folder.uses("patterns", "-".join(about.values()), fitted, "patterns.safetensors")


@dataclass(frozen=True, kw_only=True)
class PatternsByEstimator(Result):
    """Patterns of every layer by estimator, (N, D) float64; none where nothing needs them."""

    patterns: Mapping[str, Mapping[str, Pattern]] = field(default_factory=dict)


@dataclass(frozen=True)
class FitPatternsOfEstimators(Stage[PatternsByEstimator]):
    """Fit patterns of several estimators on the same statistics, for a picture that shows them side by side."""

    setup: Setup
    machine: Machine
    estimators: Mapping[str, Estimator]
    name = FitPatterns.name
    title = FitPatterns.title

    def run(self, done: Done, bar: Bar) -> PatternsByEstimator:
        moments, visited = collect(self.setup, self.machine, "fit", all_samples(self.setup, gram=False), bar)
        patterns = {
            name: fit_patterns(replace(self.setup, estimator=estimator), moments)
            for name, estimator in self.estimators.items()
        }
        return PatternsByEstimator(patterns=patterns, visited=visited)
