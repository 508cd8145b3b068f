"""Image degradation (Fig. 4a): does destroying what the method calls relevant destroy the prediction?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.engine.explanation_streams import DegradationStream
from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.metrics.degradation import area_over_curve, grid_of, mean_interval, random_patch_order
from pattern_bench.pipeline.explain import depends_on, why_no_explanation
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import build_method
from pattern_bench.pipeline.patterns import FittedPatterns
from pattern_bench.pipeline.rows import collect_rows
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import Visited
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.plotting.figures import draw_degradation
from pattern_bench.processes import collectives
from pattern_bench.results.labels import RANDOM_ORDER
from pattern_bench.results.schema import AREA_COLUMNS, DEGRADATION_COLUMNS, area_rows, degradation_rows
from pattern_bench.storage.cache import key_of

BASELINE_VERSION = 1
"""Of how images are degraded; curves of another are taken again."""


def patch_and_steps(setup: Setup) -> tuple[int, int]:
    """Side of a patch and number of patches to replace: the settings, or the paper's 9 and 100 at 224 pixels scaled
    to the image's size. A patch of one pixel would be replaced by itself, so the default is at least 2.

    Raises:
        UserError: where there are fewer patches than steps.
    """
    spatial = setup.sample.shape[1:]
    patch = setup.cfg.degradation.patch or max(2, round(9 / 224 * min(spatial)))
    count = math.prod(grid_of(spatial, patch))
    steps = setup.cfg.degradation.steps or max(1, min(100, count))
    if steps > count:
        raise UserError(
            f"degradation.steps={steps} is more than the {count} whole patches of "
            f"{'×'.join([str(patch)] * len(spatial))} pixels in images of {'×'.join(map(str, spatial))}: take fewer "
            "steps, or a smaller degradation.patch"
        )
    return patch, steps


def curve_name(setup: Setup, method: str) -> str:
    """A method's name in the degradation results: with what differs from the paper's protocol."""
    settings = setup.cfg.degradation
    parts = [method]
    if settings.order == "least" and method != RANDOM_ORDER:
        parts.append("least relevant first")
    if settings.replacement != "mean":
        parts.append("blur" if settings.replacement == "blur" else f"constant {settings.value:g}")
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Degradation(Result):
    """What degrading the first validation images does to the class first predicted.

    Attributes:
        patch: side of a patch, in pixels.
        steps: patches that are replaced.
        curves: rows of ``degradation.csv``.
        areas: rows of ``areas.csv``.
        means: the mean area over each curve, by its name.
        intervals: 95 % bootstrap intervals of these.
    """

    patch: int | None = None
    steps: int | None = None
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(DEGRADATION_COLUMNS)))
    areas: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(AREA_COLUMNS)))
    means: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, list[float]] = field(default_factory=dict)


def degrade(
    setup: Setup, machine: Machine, patterns: Mapping[str, Pattern], bar: Bar
) -> tuple[dict[str, Tensor], list[str], Visited]:
    """Degrade the first validation images in the method's order, and in a random one.

    Args:
        setup: network, method and settings.
        machine: where it computes and keeps the unfinished stage.
        patterns: by layer, shaped as the weights.
        bar: moved image by image.

    Returns:
        Curves by name, (images, steps + 1) probabilities; names of these images; what was visited.

    Raises:
        UserError: where none of the images can be read.
    """
    patch, steps = patch_and_steps(setup)
    how = setup.cfg.degradation
    split = setup.splits["validation"].first(how.images or len(setup.splits["validation"]))
    random_order = random_patch_order(
        len(split), grid_of(setup.sample.shape[1:], patch), torch.Generator().manual_seed(setup.cfg.seed)
    )
    replaced = {"patch": patch, "steps": steps, "replacement": how.replacement, "value": how.value}

    def stream(methods: Mapping[str, Any], baseline: bool) -> DegradationStream:
        return DegradationStream(
            setup.model, methods, patch, steps, random_order, how.order, how.replacement, how.value, baseline
        )

    method = build_method(setup, machine.device, patterns)
    size = 1 if method.many_passes else None
    only = stream({method.name: method}, baseline=False)
    what = {**depends_on(setup), "order": how.order, **replaced}
    curves, visited = collect_rows(setup, machine, only, split, "degrade", patterns, bar, size, **what)
    if not curves:
        raise UserError(f"none of the first {len(split)} validation images can be read: mend the files")
    # The same for every method, so that a sweep takes it once.
    shared = {"version": BASELINE_VERSION, "model": setup.model_key, "images": split.fingerprint, **replaced}
    shared |= machine.rounding
    key = key_of(**shared, seed=setup.cfg.seed, batch_size=setup.source.batch_size, processes=collectives.world_size())
    with machine.cache.lock("baselines", key) if collectives.is_rank_zero() else nullcontext():
        baseline = _kept_baseline(machine, key, len(curves[method.name]))
        if baseline is None:
            none = stream({}, baseline=True)
            rows, _ = collect_rows(setup, machine, none, split, "baseline", {}, bar, None, **replaced)
            baseline = rows[RANDOM_ORDER].double()
            if collectives.is_rank_zero():
                machine.cache.save("baselines", key, {RANDOM_ORDER: baseline}, setup.names)
    curves[RANDOM_ORDER] = baseline
    unreadable = set(visited.unreadable)
    names = [name for name in map(split.name, range(len(split))) if name not in unreadable]
    return {curve_name(setup, name): curves[name] for name in (RANDOM_ORDER, method.name)}, names, visited


def _kept_baseline(machine: Machine, key: str, images: int) -> Tensor | None:
    """The random order's curves (images, steps + 1) where an earlier job left those of as many images in the cache, in
    every process."""
    entry = machine.cache.load("baselines", key) if collectives.is_rank_zero() else None
    rows = None if entry is None or len(entry[0][RANDOM_ORDER]) != images else entry[0][RANDOM_ORDER]
    shape = collectives.broadcast_text("" if rows is None else json.dumps(list(rows.shape)))
    if not shape:
        return None
    return collectives.broadcast(torch.zeros(json.loads(shape), dtype=torch.float64) if rows is None else rows)


def area_intervals(setup: Setup, areas: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over images of the area (images,) over the curve; the same draws for every method."""
    return {
        name: list(mean_interval(area, torch.Generator().manual_seed(setup.cfg.seed))) for name, area in areas.items()
    }


@dataclass(frozen=True)
class Degrade(Stage[Degradation]):
    """Degrade validation images, and measure the area over each curve."""

    setup: Setup
    machine: Machine
    name = "degrade"
    title = "image degradation"

    def why_skipped(self) -> str | None:
        return why_no_explanation(self.setup)

    def without(self, reason: str) -> Degradation:
        return Degradation(skipped=reason)

    def run(self, done: Done, bar: Bar) -> Degradation:
        setup = self.setup
        patch, steps = patch_and_steps(setup)
        curves, images, visited = degrade(setup, self.machine, done[FittedPatterns].shaped, bar)
        areas = {name: area_over_curve(curve.double()) for name, curve in curves.items()}
        estimator = setup.estimator.name if setup.method_uses_estimator else "none"
        common = (setup.model_name, setup.source.name, estimator)
        return Degradation(
            patch=patch, steps=steps, curves=degradation_rows(curves, *common), areas=area_rows(areas, images, *common),
            means={name: float(area.mean()) for name, area in areas.items()}, intervals=area_intervals(setup, areas),
            visited=visited,
        )  # fmt: skip

    def write(self, result: Degradation, run_folder: RunFolder) -> None:
        run_folder.csv("degradation.csv", result.curves)
        run_folder.csv("areas.csv", result.areas)
        run_folder.table("degradation", result.curves)
        setup = self.setup
        about = f"{setup.model_name} on {setup.source.name}, {setup.estimator.name}"
        run_folder.picture(
            "figures/degradation", "degradation.png", f"Image degradation of {about}",
            lambda file: draw_degradation(result.curves, file),
        )  # fmt: skip
        for step, rows in result.curves.groupby("step"):
            run_folder.curve("degradation", int(str(step)), dict(zip(rows.method, rows.probability_mean, strict=True)))
        run_folder.metrics({f"area_over_curve/{method}": area for method, area in result.means.items()})
