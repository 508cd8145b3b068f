"""The stages that ask the network: how often it is right, what explains its answers, and whether to believe that."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from pattern_bench.configuration.build import build
from pattern_bench.core.estimators import Pattern
from pattern_bench.data.splits import Split
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import AccuracyStream, DegradationStream, ExplanationStream, RowStream
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, create, kind_of
from pattern_bench.methods.patterns import LrpZ, PatternAttribution, PatternNet
from pattern_bench.metrics.degradation import area_over_curve, grid_of, mean_interval, random_ranks
from pattern_bench.pipeline.run_pass import Met, met, stream_over
from pattern_bench.pipeline.setup import Setup
from pattern_bench.processes import collectives
from pattern_bench.storage.cache import key_of
from pattern_bench.storage.tensor_files import checksum

BASELINE_VERSION = 1
"""Of how images are degraded; curves of another are taken again."""


def why_no_accuracy(setup: Setup) -> str | None:
    """Why the network's accuracy cannot be measured, or None."""
    pool = setup.splits["validation"].pool
    if setup.source.regression:
        return f"data={setup.source.name} is a regression"
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier"
    if pool.labels is None:
        return f"data={setup.source.name} has no labels"
    if pool.classes != setup.outputs and (pool.classes, setup.outputs) != (2, 1):
        return (
            f"data={setup.source.name} has {pool.classes} classes and model={setup.model_name} {setup.outputs} outputs"
        )
    return None


def why_no_explanation(setup: Setup) -> str | None:
    """Why the network's answers cannot be explained, or None."""
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier, so there is no answer to explain"
    if setup.sample.ndim < 2:
        return f"data={setup.source.name} has no images"
    if setup.layers != setup.all_layers and chosen_method(setup)[1] and setup.estimator.has_pattern:
        return (
            f"layer={setup.cfg.layer} selects {len(setup.layers)} of {len(setup.all_layers)} layers, and a whole "
            "network's explanation needs the patterns of all"
        )
    return None


def measure_accuracy(setup: Setup, bar: Bar) -> tuple[dict[str, Any], Met]:
    """Top-1 and top-5 accuracy on the validation images, or why there is none; and the images met."""
    split = setup.splits["validation"]
    stream = AccuracyStream(setup.model)
    bar.start(0, unit="images")
    partial = setup.partial("accuracy", model=setup.model_key, images=split.fingerprint)
    stream_over(setup, stream, split, partial, bar)
    found = met(split, stream.seen)
    if not found.images:
        return {"skipped": f"none of the {len(split)} validation images can be read"}, found
    top1, top5 = collectives.total(stream.right).tolist()
    return {"top1": top1 / found.images, "top5": top5 / found.images, "images": found.images}, found


def check(setup: Setup) -> None:
    """
    Raises:
        UserError: where the method, or the degradation protocol, cannot serve the network and data.
    """
    method, _ = chosen_method(setup)
    if why_no_explanation(setup) is None:
        patch_and_steps(setup)
        check_method(setup, method)


def chosen_method(setup: Setup) -> tuple[Any, bool]:
    """The method to explain with, still to be given its network, and whether it is the estimator's.

    Under S_x, PatternAttribution is the z-rule.

    Raises:
        UserError: where it needs patterns and the estimator has none.
    """
    method = build(setup.cfg.method)
    if not method.func.needs_patterns:
        return method, False
    if setup.estimator.has_pattern:
        return method, True
    if method.func is PatternAttribution:
        return LrpZ, True
    raise UserError(
        f"method={method.func.name} needs patterns, and estimator={setup.estimator.name} has none: choose another "
        "estimator, or a method without patterns such as lrp_z"
    )


def check_method(setup: Setup, method: Any) -> None:
    """Makes a method once, with the weights for patterns, so that it can refuse its settings before anything is
    computed."""
    weights: dict[str, Any] = {name: setup.model.get_submodule(name).weight for name in setup.all_layers}
    own = {name: Pattern(w, w, torch.zeros(len(w), dtype=torch.bool)) for name, w in weights.items()}
    create(method, setup.model, own, setup.sample[None])


def method_of(setup: Setup, patterns: Mapping[str, Pattern]) -> Method:
    """The method that explains the network."""
    method, _ = chosen_method(setup)
    return create(method, setup.model, patterns, reference_images(setup, [method]))


def reference_images(setup: Setup, methods: Iterable[Any]) -> Tensor | None:
    """Images whose parts may take the place of others', the first of the fit split; None where no method asks."""
    if not any(kind_of(method).takes_reference for method in methods):
        return None
    split = setup.splits["fit"]
    images = split.batch(range(min(100, len(split)))).images
    if images is None:
        raise UserError("none of the first 100 images of the fit split can be read: mend the files")
    return images.to(setup.device)


def curve_name(setup: Setup, method: str) -> str:
    """A method's name in the degradation results: with what differs from the paper's protocol."""
    settings = setup.cfg.degradation
    parts = [method]
    if settings.order == "least" and method != "random_order":
        parts.append("least relevant first")
    if settings.replacement != "mean":
        parts.append("blur" if settings.replacement == "blur" else f"constant {settings.value:g}")
    return ", ".join(parts)


def explain(
    setup: Setup, patterns: Mapping[str, Pattern], bar: Bar
) -> tuple[tuple[Tensor, dict[str, Tensor], list[str]], Met]:
    """The first validation images, their explanations by title, and a caption for each; and the images met.

    Raises:
        UserError: where none of the images can be read.
    """
    split = setup.splits["validation"].first(setup.cfg.explanation.images)
    method = method_of(setup, patterns)
    methods: dict[str, Method] = {}
    if setup.estimator.has_pattern and setup.layers == setup.all_layers and not isinstance(method, PatternNet):
        methods["signal"] = PatternNet(setup.model, patterns)
    titles = {PatternAttribution: "attribution", PatternNet: "signal", LrpZ: "input × gradient"}
    title = titles.get(type(method), f"signal, {method.name}" if method.kind == "signal" else method.name)
    methods[title] = method
    stream = ExplanationStream(setup.model, len(split), methods)
    # One image at a time: some methods take minutes for each.
    rows, found = _rows(setup, stream, split, "explain", patterns, bar, batch_size=1, **_how(setup))
    if "images" not in rows:
        raise UserError("none of the first validation images can be read: give more (explanation.images)")
    captions = [
        f"predicted {p} ({c:.0%})" + ("" if t < 0 or why_no_accuracy(setup) else f"\ntrue {t}")
        for p, c, t in zip(
            rows["predicted"].tolist(), rows["confidence"].tolist(), rows["targets"].tolist(), strict=True
        )
    ]
    return (rows["images"], {title: rows[f"explanation/{title}"] for title in methods}, captions), found


def _rows(
    setup: Setup,
    stream: RowStream,
    split: Split,
    stage: str,
    patterns: Mapping[str, Pattern],
    bar: Bar,
    batch_size: int | None,
    **more: Any,
) -> tuple[dict[str, Tensor], Met]:
    """The stream's rows of all images that can be read, from all processes, by name; and the images met."""
    used = {f"{layer}/{part}": tensor for layer, p in patterns.items() for part, tensor in vars(p).items()}
    partial = setup.partial(
        stage, model=setup.model_key, images=split.fingerprint, patterns=checksum(used, {}), seed=setup.cfg.seed,
        **more,
    )  # fmt: skip
    bar.start(0, unit="images")
    stream_over(setup, stream, split, partial, bar, batch_size)
    return _joined_rows(stream), met(split, stream.seen)


def _how(setup: Setup) -> dict[str, Any]:
    """What explanations depend on besides the network, its patterns and the images: a part of their keys."""
    reference = kind_of(chosen_method(setup)[0]).takes_reference
    return {
        "method": OmegaConf.to_container(setup.cfg.method, resolve=True),
        "estimator": setup.estimator.name,
        "reference": setup.splits["fit"].fingerprint if reference else None,
    }


def _joined_rows(stream: RowStream) -> dict[str, Tensor]:
    """The rows of all processes; those of images that none could read are left out."""
    known = collectives.total(stream.known.to(torch.int32)).bool()
    # A process without images knows neither names nor shapes: it learns them from one that does.
    described = {name: [str(rows.dtype).removeprefix("torch."), list(rows.shape)] for name, rows in stream.rows.items()}
    described = json.loads(collectives.text_from_any(json.dumps(described) if described else "") or "{}")
    found = {}
    for name, (kind, shape) in described.items():
        mine = stream.rows.get(name)
        rows = torch.zeros(shape, dtype=getattr(torch, kind)) if mine is None else mine
        found[name] = collectives.total(rows)[known]
    return found


def patch_and_steps(setup: Setup) -> tuple[int, int]:
    """Side of a patch and number of patches to replace: the settings, or the paper's 9 and 100 at 224 pixels scaled
    to the image's size. A patch of one pixel would be replaced by itself, so the default is at least 2."""
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


def degrade(
    setup: Setup, patterns: Mapping[str, Pattern], bar: Bar
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str], Met]:
    """Degradation curves by method, (images, steps + 1), and the areas over them (images,); names of these images; and
    all images met.

    Raises:
        UserError: where none of the images can be read.
    """
    patch, steps = patch_and_steps(setup)
    split = setup.splits["validation"].first(setup.cfg.degradation.images or len(setup.splits["validation"]))
    grid = grid_of(setup.sample.shape[1:], patch)
    order = random_ranks(len(split), grid, torch.Generator().manual_seed(setup.cfg.seed))
    how = setup.cfg.degradation
    replaced = {"patch": patch, "steps": steps, "replacement": how.replacement, "value": how.value}

    def stream(methods: Mapping[str, Any], baseline: bool) -> DegradationStream:
        return DegradationStream(
            setup.model, methods, patch, steps, order, how.order, how.replacement, how.value, baseline
        )

    method = method_of(setup, patterns)
    size = 1 if method.many_passes else None
    only = stream({method.name: method}, baseline=False)
    what = {**_how(setup), "order": how.order, **replaced}
    curves, found = _rows(setup, only, split, "degrade", patterns, bar, size, **what)
    if not curves:
        raise UserError(f"none of the first {len(split)} validation images can be read: mend the files")
    # The same for every method, so that a sweep takes it once.
    shared = {"version": BASELINE_VERSION, "model": setup.model_key, "images": split.fingerprint, **replaced}
    shared |= setup.arithmetic
    key = key_of(**shared, seed=setup.cfg.seed, batch_size=setup.source.batch_size, processes=collectives.size())
    with setup.cache.lock("baselines", key) if collectives.first() else nullcontext():
        baseline = _kept_baseline(setup, key, len(curves[method.name]))
        if baseline is None:
            rows, _ = _rows(setup, stream({}, baseline=True), split, "baseline", {}, bar, None, **replaced)
            baseline = rows["random_order"].double()
            if collectives.first():
                setup.cache.save("baselines", key, {"random_order": baseline}, setup.names)
    curves["random_order"] = baseline
    names = [name for name in map(split.name, range(len(split))) if name not in set(found.unreadable)]
    named = {curve_name(setup, name): curves[name] for name in ("random_order", method.name)}
    return named, {name: area_over_curve(curve.double()) for name, curve in named.items()}, names, found


def _kept_baseline(setup: Setup, key: str, images: int) -> Tensor | None:
    """The random order's curves (images, steps + 1) where an earlier job left those of as many images in the cache, in
    every process."""
    entry = setup.cache.load("baselines", key) if collectives.first() else None
    rows = None if entry is None or len(entry[0]["random_order"]) != images else entry[0]["random_order"]
    shape = collectives.text_from_any("" if rows is None else json.dumps(list(rows.shape)))
    if not shape:
        return None
    return collectives.from_first(torch.zeros(json.loads(shape), dtype=torch.float64) if rows is None else rows)


def area_intervals(setup: Setup, areas: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over images of the area (images,) over the curve; the same draws for every method."""
    return {
        name: list(mean_interval(area, torch.Generator().manual_seed(setup.cfg.seed))) for name, area in areas.items()
    }
