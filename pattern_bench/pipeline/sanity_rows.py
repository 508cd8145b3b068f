"""What both sanity checks have in common: rows of ``sanity.csv``, and the explainer they ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.metrics.base import similarity_measures
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import Explainer, reference_images
from pattern_bench.pipeline.patterns import PatternsByEstimator
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, LeftOut, Result

COLUMNS = (
    "model", "data", "estimator", "method", "check", "layer", "layer_index", "measure", "mean", "std", "n",
)  # fmt: skip
MEASURES = {name: measure.title for name, measure in similarity_measures().items()}
"""Of how alike two heat maps are, and what figures call them."""


@dataclass(frozen=True, kw_only=True)
class SanityRows(Result):
    """Rows of ``sanity.csv``, but for the columns that are the same in all."""

    rows: list[dict[str, Any]]


def row(method: str, check: str, layer: str, index: int, measure: str, values: Tensor) -> dict[str, Any]:
    """Mean and spread over the images that have a value."""
    values = values[~values.isnan()]
    return {
        "method": method, "check": check, "layer": layer, "layer_index": index, "measure": measure,
        "mean": float(values.mean()) if len(values) else float("nan"),
        "std": float(values.std()) if len(values) > 1 else float("nan"), "n": len(values),
    }  # fmt: skip


def named(left_out: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """Parts that could not be computed, from the reasons by name."""
    return tuple(LeftOut(name, name, reason) for name, reason in left_out.items())


def make_explainer(setup: Setup, machine: Machine, methods: Mapping[str, Any], done: Done) -> Explainer:
    """What explains the trained network with the patterns fitted, on the machine's device."""
    by_estimator = done[PatternsByEstimator].patterns if PatternsByEstimator in done else {}
    patterns: Mapping[str, Pattern] = by_estimator.get(setup.estimator.name, {})
    setup.model.to(machine.device)
    reference = reference_images(setup, machine.device, methods.values())
    return Explainer(setup.model, patterns, reference, setup.source.batch_size)
